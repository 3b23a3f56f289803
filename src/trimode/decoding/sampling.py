"""From logits to tokens: penalties, truncation, choice and verification, as functions of logits and history.

Random choices invert the cumulative distribution at a uniform number from the request's own CPU generator, so that a seed gives the
same answer alone or in a batch, on any device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimode.decoding.interface import DraftHead, Generation, Rows, TokenLogprob, sent
from trimode.decoding.reading import Reading
from trimode.decoding.settings import Settings

__all__ = [
    "Verified",
    "adjusted",
    "best_tokens",
    "draft_tokens",
    "fill_from_left",
    "likeliest",
    "logprob_tables",
    "next_token",
    "pick",
    "scores_after",
    "token_logprobs",
    "told_logprobs",
    "truncated_distribution",
    "uniform",
    "unread_token",
    "verify",
    "verify_and_draft",
]


def adjusted(
    logits: Float[Tensor, "T V"],
    generation: Generation,
    history: Sequence[int] | None = None,
    counts: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, "T V"]:
    """Logits in float32 with the mask excluded and bias and penalties applied. `history`: prompt and answer as the penalties
    see them, the generation's final tokens if None. `counts`: how often the answer goes on with each token behind that, where only the
    device knows."""
    settings = generation.settings
    out = logits.float()
    if out is logits:
        out = logits.clone()
    mask = generation.traits.mask_token_id
    if mask >= 0:
        out[:, mask] = float("-inf")
    if settings.logit_bias:
        ids = sent(list(settings.logit_bias), out.device)
        out[:, ids] += sent(list(settings.logit_bias.values()), out.device, out.dtype)
    if settings.repetition_penalty != 1.0:
        seen = sent(sorted(set(generation.final if history is None else history)), out.device)
        p = settings.repetition_penalty
        if counts is None:
            scores = out[:, seen]
            out[:, seen] = torch.where(scores > 0, scores / p, scores * p)
        else:
            is_seen = (counts > 0).index_fill(0, seen, True)
            out = torch.where(is_seen, torch.where(out > 0, out / p, out * p), out)
    if settings.presence_penalty or settings.frequency_penalty:
        answer = (generation.final if history is None else history)[len(generation.prompt) :]
        said, times = torch.tensor(list(answer), dtype=torch.long).unique(return_counts=True)
        said, times = sent(said, out.device), sent(times.to(out.dtype), out.device)
        if counts is not None:
            times = counts.index_add(0, said, times)
        less = settings.presence_penalty + settings.frequency_penalty * times
        if counts is None:
            out[:, said] -= less
        else:
            out -= torch.where(times > 0, less, 0.0)
    return out


def best_tokens(rows: Rows, generation: Generation) -> Tensor:
    """The arg-max of each row's adjusted logits, unread."""
    if rows.best is not None and _takes_logits_as_they_are(generation):
        return torch.tensor(rows.best, dtype=torch.long)
    if rows.unread_best is not None and _takes_logits_as_they_are(generation):
        return rows.unread_best
    return adjusted(rows.logits, generation).argmax(dim=-1)


def likeliest(
    rows: Rows, generation: Generation, history: Sequence[int] | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The arg-max of each row's adjusted logits, and how probable it is, both unread."""
    if _takes_logits_as_they_are(generation) and not (rows.best is None and rows.unread_best is None):
        return best_tokens(rows, generation), rows.best_probabilities()
    tokens = adjusted(rows.logits, generation, history, counts).argmax(dim=-1)
    return tokens, rows.probabilities(tokens)


def _takes_logits_as_they_are(generation: Generation) -> bool:
    settings = generation.settings
    return not settings.has_penalty and not settings.logit_bias


def _is_plain(generation: Generation) -> bool:
    """Its choice is the arg-max of the logits as they are."""
    s = generation.settings
    return s.temperature == 0 and generation.constraint is None and _takes_logits_as_they_are(generation)


def scores_after(logits: Float[Tensor, "1 V"], generation: Generation, history: Sequence[int]) -> Float[Tensor, "1 V"]:
    """Adjusted logits of the place behind this very history, without what the request's constraint forbids there."""
    scores = adjusted(logits, generation, history)
    if generation.constraint is not None:
        allowed = generation.constraint.allowed(history[len(generation.prompt) :])
        scores.masked_fill_(sent(~allowed, scores.device), float("-inf"))
    return scores


def token_logprobs(tokens: Sequence[int], rows: Rows, generation: Generation) -> Reading[tuple[TokenLogprob, ...]]:
    """Each token's log-probability by its row of logits as the model gave them; nothing if the request does not ask."""
    if generation.settings.logprobs is None or not tokens:
        return ()
    rows = rows[: len(tokens)]
    tables = logprob_tables(sent(tokens, rows.logits.device, torch.long), rows, generation)
    return told_logprobs(tokens, (yield tables))


def logprob_tables(tokens: Tensor, rows: Rows, generation: Generation) -> list[Tensor]:
    """What `told_logprobs` wants to read of one token a row; nothing if the request does not ask."""
    num_best = generation.settings.logprobs
    if num_best is None:
        return []
    logprobs = rows.logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(num_best, dim=-1)
    own = logprobs.gather(-1, tokens[:, None])
    return [torch.cat((own.double(), values.double(), ids.double()), dim=-1)]


def told_logprobs(tokens: Sequence[int], tables: list[list[list[float]]]) -> tuple[TokenLogprob, ...]:
    """Of the tokens of the first rows, from the numbers of `logprob_tables`."""
    found = []
    for table in tables:
        for token, (own, *best) in zip(tokens, table, strict=False):
            num_best = len(best) // 2
            found.append(TokenLogprob(token, own, tuple(zip(map(int, best[num_best:]), best[:num_best], strict=True))))
    return tuple(found)


def truncated_distribution(logits: Float[Tensor, "T V"], settings: Settings) -> Float[Tensor, "T V"]:
    """Probabilities after temperature, top-k, top-p and min-p, in this order, from adjusted logits. temperature > 0."""
    # float64: in float32 the tail of a large vocabulary's cumulative sum is lost and top-p keeps too much. Less the maximum first, so
    # that a tiny temperature cannot overflow.
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        # by index, not by value: ties beyond the k-th are common in bfloat16
        best = scaled.sort(dim=-1, descending=True, stable=True).indices[:, : settings.top_k]
        scaled = torch.full_like(scaled, float("-inf")).scatter(-1, best, scaled.gather(-1, best))
    p = scaled.softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= settings.top_p, 0.0))
        p = kept / kept.sum(dim=-1, keepdim=True)
    if settings.min_p > 0:
        p = p.masked_fill(p < settings.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def uniform(generation: Generation, count: int = 1) -> Tensor:
    """Uniform numbers in [0, 1), float64, on the CPU."""
    return torch.rand(count, generator=generation.random, dtype=torch.float64)


def pick(p: Float[Tensor, "T V"], u: Float[Tensor, " T"]) -> Int[Tensor, " T"]:
    """One token a row: where the cumulative distribution passes u."""
    cumulative = p.cumsum(dim=-1)
    target = sent(u, p.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # rounding may carry u past the last token with any probability
    last = p.shape[-1] - 1 - (p > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(index, last)


def forced_token(generation: Generation, history: Sequence[int]) -> int | None:
    """`</think>` where the thinking budget is used up without one, given all tokens before this place; else None."""
    settings = generation.settings
    budget, token = settings.max_thinking_tokens, settings.end_think_token_id
    num_new = len(history) - len(generation.prompt)
    if budget is None or token is None or num_new < budget:
        return None
    return None if token in history[len(generation.prompt) :] else token


def next_token(row: Rows, generation: Generation) -> Reading[tuple[int, tuple[TokenLogprob, ...]]]:
    """The autoregressive choice after everything final, from one row, and what the model thought of it if the request asks."""
    token = unread_token(row, generation, generation.final)
    if isinstance(token, int):
        return token, (yield from token_logprobs((token,), row, generation))
    told = yield [token, *logprob_tables(token, row, generation)]
    return told[0][0], told_logprobs(told[0], told[1:])


def unread_token(row: Rows, generation: Generation, history: Sequence[int]) -> int | Tensor:
    """The choice behind this history; unread [1] where the host does not know it."""
    forced = forced_token(generation, history)
    if forced is not None:
        return forced
    if _is_plain(generation) and row.best is not None:
        return row.best[0]
    if _is_plain(generation) and row.unread_best is not None:
        return row.unread_best
    scores = scores_after(row.logits, generation, history)
    u = uniform(generation) if generation.settings.temperature > 0 else None
    return _likeliest_or_drawn(scores, generation, u)[0]


def draft_tokens(rows: Rows, generation: Generation, *before: int) -> Reading[tuple[list[int], Tensor | None]]:
    """Tentative tokens for masked places, and the distributions that they were drawn from: None if they are arg-maxima.
    `before`: tokens that become final in this step and precede the places."""
    head = _draft_head(rows, generation)
    if _is_plain(generation) and head is None and rows.best is not None:
        return list(rows.best), None
    last = before[-1] if before else generation.final[-1]
    if _is_plain(generation) and head is not None and not rows.lie_on_device:
        return head.draft(rows.hidden, rows.logits, last)[0], None
    history = [*generation.final, *before]
    # on a CPU few tokens are looked at sooner than a whole vocabulary's counts
    if generation.constraint is not None or (
        head is not None and generation.settings.has_penalty and not rows.lie_on_device
    ):
        return (yield from _draft_in_order(rows, head, generation, history))
    u = uniform(generation, len(rows)) if generation.settings.temperature > 0 else None
    tokens, q = _drafted(rows, head, generation, history, last, u)
    (drafts,) = yield [tokens]
    return drafts, q


class Verified(NamedTuple):
    """What a verification made final, and the drafts behind it."""

    committed: list[int]
    logprobs: tuple[TokenLogprob, ...]
    drafts: list[int]
    q: Tensor | None
    """Distributions that the drafts were drawn from; None: they are arg-maxima."""


def verify_and_draft(
    drafts: Sequence[int], q: Tensor | None, rows: Rows, ahead: Rows, generation: Generation
) -> Reading[Verified]:
    """What `verify` makes final, and what `draft_tokens` makes of the masks behind it: of the rows `ahead`, as many for each way that
    the verification may end. Where they lie on a device all is read at once, but for drafts under a constraint."""
    if generation.constraint is None and rows.lie_on_device:
        return (yield from _verified_there(drafts, q, rows, ahead, generation))
    committed, logprobs = yield from verify(drafts, q, rows, generation)
    per_group = len(ahead) // (len(drafts) + 1)
    start = (len(committed) - 1) * per_group
    new, q_ahead = yield from draft_tokens(ahead[start : start + per_group], generation, *committed)
    return Verified(committed, logprobs, new, q_ahead)


def _verified_there(
    drafts: Sequence[int], q: Tensor | None, rows: Rows, ahead: Rows, generation: Generation
) -> Reading[Verified]:
    """`verify_and_draft` where the logits lie, read at once. ahead: none, if nothing is to be drafted."""
    n, device = len(drafts), rows.logits.device
    per_group = len(ahead) // (n + 1)
    u = before = None
    if generation.settings.temperature > 0:
        before = generation.random.get_state()
        u = sent(uniform(generation, n + 1 + per_group), device)
    forced = _forced_place(drafts, generation)
    accepted, others = _judged(drafts, q, rows, generation, u, forced)
    num = accepted.long().cumprod(dim=0).sum().view(1)
    # place by place: the accepted drafts, what stands behind them, and no matter what
    place = torch.arange(n + 1, device=device)
    line = torch.where(place < num, torch.cat((sent(drafts, device, torch.long), others[n:])), others)
    read = [num, line, *logprob_tables(line, rows, generation)]
    q_ahead = None
    if per_group:
        step = torch.arange(per_group, device=device)
        group = num * per_group + step
        own = ahead.picked(group)
        counts = None
        if generation.settings.has_penalty:
            counts = torch.zeros(own.logits.shape[-1], device=device).index_add(0, line, (place <= num).float())
        u_ahead = None if u is None else u.index_select(0, _num_drawn(num, n, forced) + step)
        head = _draft_head(own, generation)
        tokens, q_ahead = _drafted(own, head, generation, generation.final, line.index_select(0, num), u_ahead, counts)
        read.append(tokens)
    told = yield read
    num_accepted = told[0][0]
    new = told.pop() if per_group else []
    if before is not None:
        # as many random numbers are used up as place by place
        generation.random.set_state(before)
        uniform(generation, int(_num_drawn(torch.tensor([num_accepted]), n, forced)) + per_group)
    committed = told[1][: num_accepted + 1]
    return Verified(committed, told_logprobs(committed, told[2:]), new, q_ahead)


def _forced_place(drafts: Sequence[int], generation: Generation) -> int | None:
    """The place of a verification that the thinking budget decides; None: there is none. Behind it no other can be: it ends there, or
    thinking has ended."""
    budget = generation.settings.max_thinking_tokens
    if budget is None:
        return None
    place = max(0, budget - generation.num_new)
    if place > len(drafts) or forced_token(generation, [*generation.final, *drafts[:place]]) is None:
        return None
    return place


def _num_drawn(num_accepted: Tensor, num_drafts: int, forced: int | None) -> Tensor:
    """Random numbers that a verification uses up: one for each accepted draft, two for what is drawn in place of the next one, one
    for what stands behind all; none for a place that is forced."""
    drawn = (num_accepted + 2).clamp(max=num_drafts + 1)
    if forced is None:
        return drawn
    return torch.where(num_accepted > forced, drawn - 1, torch.where(num_accepted == forced, num_accepted, drawn))


def _draft_head(rows: Rows, generation: Generation) -> DraftHead | None:
    return rows.draft_head if generation.traits.adapter_on_draft != "none" and rows.hidden is not None else None


def _likeliest_or_drawn(scores: Tensor, generation: Generation, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A token a row where these adjusted logits lie, and the distributions that they were drawn from with the numbers u; None:
    greedy."""
    if u is None:
        return scores.argmax(dim=-1), None
    p = truncated_distribution(scores, generation.settings)
    return pick(p, u), p


def _drafted(
    rows: Rows,
    head: DraftHead | None,
    generation: Generation,
    history: Sequence[int],
    before: int | Tensor,
    u: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`draft_tokens`, unread and with random numbers given. before: the token that precedes them, which may lie where they do. With a
    head penalties see `history` and what `counts` has behind it; without one, what is final."""
    if head is None and u is None:
        return best_tokens(rows, generation), None
    if head is None:
        return _likeliest_or_drawn(adjusted(rows.logits, generation), generation, u)
    if u is None and _takes_logits_as_they_are(generation):
        return head.drafted(rows.hidden, rows.logits, before)[0].long(), None
    if generation.settings.has_penalty and counts is None:
        counts = torch.zeros(rows.logits.shape[-1], device=rows.logits.device)
    tokens, distributions = [], []
    for j in range(len(rows)):
        own = slice(j, j + 1)
        logits = head.rescored(rows.hidden[own], rows.logits[own], before)
        scores = adjusted(logits, generation, history, counts)
        before, q = _likeliest_or_drawn(scores, generation, None if u is None else u[own])
        if counts is not None:
            counts = counts.index_add(0, before, torch.ones_like(before, dtype=counts.dtype))
        tokens.append(before)
        distributions.append(q)
    if not tokens:
        return torch.empty(0, dtype=torch.long, device=rows.logits.device), None
    return torch.cat(tokens), None if u is None else torch.cat(distributions)


def _draft_in_order(
    rows: Rows, head: DraftHead | None, generation: Generation, history: list[int]
) -> Reading[tuple[list[int], Tensor | None]]:
    """Drafts place by place, each knowing what was drafted before it: what a constraint forbids there is never drafted."""
    tokens: list[int] = []
    distributions = []
    for j in range(len(rows)):
        logits = rows.logits[j : j + 1]
        if head is not None:
            logits = head.rescored(rows.hidden[j : j + 1], logits, (history + tokens)[-1])
        scores = scores_after(logits, generation, history + tokens)
        u = uniform(generation) if generation.settings.temperature > 0 else None
        chosen, q = _likeliest_or_drawn(scores, generation, u)
        ((token,),) = yield [chosen]
        tokens.append(token)
        distributions.append(q)
    return tokens, None if generation.settings.temperature == 0 or not distributions else torch.cat(distributions)


def fill_from_left(
    rows: Rows,
    generation: Generation,
    history: Sequence[int],
    threshold: float,
    *,
    all_of_it: bool = False,
) -> Reading[tuple[list[int], list[float], tuple[TokenLogprob, ...]]]:
    """Tokens for the places behind this history under a constraint, as far from the left as each reaches the threshold; one at
    least. Also how sure each was, among what the constraint allows, and what the model thought of each if the request asks."""
    tokens: list[int] = []
    sure: list[float] = []
    logprobs: tuple[TokenLogprob, ...] = ()
    for j in range(len(rows)):
        row = rows[j : j + 1]
        scores = scores_after(row.logits, generation, [*history, *tokens])
        u = uniform(generation) if generation.settings.temperature > 0 else None
        chosen, _ = _likeliest_or_drawn(scores, generation, u)
        confidence = scores.softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
        (token,), (how_sure,), *tables = yield [chosen, confidence, *logprob_tables(chosen, row, generation)]
        if tokens and how_sure < threshold and not all_of_it:
            break
        tokens.append(token)
        sure.append(how_sure)
        logprobs += told_logprobs([token], tables)
    return tokens, sure, logprobs


def verify(
    drafts: Sequence[int],
    q: Float[Tensor, "T V"] | None,
    rows: Rows,
    generation: Generation,
    *,
    at_once: bool | None = None,
) -> Reading[tuple[list[int], tuple[TokenLogprob, ...]]]:
    """The tokens that follow `generation.final`: the accepted run of drafts and one more, distributed exactly as if each had been
    drawn from the causal logits one by one. Row i predicts drafts[i]; the last row follows all of them. Also what the model thought of
    each, if the request asks.

    Greedy: a draft is accepted if it is the arg-max. Sampled (arXiv 2211.17192): draft x is accepted with probability
    min(1, p(x) / q(x)), else a token is drawn from the positive part of p - q. Without `q` a draft counts as certain (q = 1 at x):
    exact for any draft however it was made, as long as these random numbers had no part in it.

    at_once: all places are looked at together, which waits once for a device; None: where logits lie on one. Else no place is looked at
    behind a rejection. Tokens and random numbers are the same either way.
    """
    settings = generation.settings
    if _is_plain(generation) and rows.best is not None and settings.max_thinking_tokens is None:
        num = 0
        while num < len(drafts) and drafts[num] == rows.best[num]:
            num += 1
        committed = list(rows.best[: num + 1])
        return committed, (yield from token_logprobs(committed, rows, generation))
    if rows.lie_on_device if at_once is None else at_once:
        found = yield from _verified_there(drafts, q, rows, rows[:0], generation)
        return found.committed, found.logprobs
    history = list(generation.final)
    start = len(history)
    for i in range(len(drafts) + 1):
        draft = drafts[i] if i < len(drafts) else None
        if settings.temperature == 0 or draft is None or forced_token(generation, history) is not None:
            token = int(unread_token(rows[i : i + 1], generation, history))
        else:
            p = truncated_distribution(scores_after(rows.logits[i : i + 1], generation, history), settings)[0]
            token = _accept_or_redraw(draft, p, None if q is None else q[i], generation)
        history.append(token)
        if token != draft:
            break
    committed = history[start:]
    return committed, (yield from token_logprobs(committed, rows, generation))


def _accept_or_redraw(draft: int, p: Tensor, q: Tensor | None, generation: Generation) -> int:
    q_draft = 1.0 if q is None else float(q[draft])
    if float(uniform(generation)) * q_draft < float(p[draft]):
        return draft
    if q is None:
        residual = p.clone()
        residual[draft] = 0.0
    else:
        residual = (p - q).clamp(min=0.0)
    if float(residual.sum()) <= 0.0:
        # p equals q up to rounding, so a rejection has no measure: the draft is as good a draw as any
        return draft
    return int(pick(residual[None], uniform(generation)))


def _judged(
    drafts: Sequence[int], q: Tensor | None, rows: Rows, generation: Generation, u: Tensor | None, forced: int | None
) -> tuple[Tensor, Tensor]:
    """For each draft whether it is accepted if those before it are [n], and what stands in its place if not, or behind all of them
    [n + 1]. Of the random numbers u each place takes one to accept its draft, the next one to draw another token; None: greedy.
    forced: the place that the thinking budget decides."""
    n, device = len(drafts), rows.logits.device
    places = sent(drafts, device, torch.long)
    first = [i - (forced is not None and i > forced) for i in range(n + 1)]
    p = None
    if _is_plain(generation) and rows.unread_best is not None:
        others = rows.unread_best.clone()
    else:
        if generation.settings.has_penalty or generation.constraint is not None:
            histories = [[*generation.final, *drafts[:i]] for i in range(n + 1)]
            scores = torch.cat([scores_after(rows.logits[i : i + 1], generation, histories[i]) for i in range(n + 1)])
        else:
            scores = adjusted(rows.logits, generation)
        others, p = scores.argmax(dim=-1), None if u is None else truncated_distribution(scores, generation.settings)
    if u is None or p is None:
        accepted = others[:n] == places
    else:
        second = sent([*(i + 1 for i in first[:n]), first[n]], device)
        p_draft = p[:n].gather(-1, places[:, None])[:, 0]
        chance = u[sent(first[:n], device, torch.long)]
        if q is None:
            accepted, residual = chance < p_draft, p[:n].scatter(-1, places[:, None], 0.0)
        else:
            accepted = chance * q.gather(-1, places[:, None])[:, 0] < p_draft
            residual = (p[:n] - q).clamp(min=0.0)
        # nothing is left: p equals q up to rounding, and the draft is as good a draw as any
        accepted |= residual.sum(dim=-1) <= 0.0
        others = pick(torch.cat([residual, p[n:]]), u[second])
    if forced is not None:
        token = generation.settings.end_think_token_id
        assert token is not None
        others[forced] = token
        if forced < n:
            accepted[forced] = drafts[forced] == token
    return accepted, others
