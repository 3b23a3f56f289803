"""From logits to tokens: penalties, truncation, choice and verification, as functions of logits and history.

Random choices invert the cumulative distribution at a uniform number from the request's own CPU generator, so that a seed gives the
same answer alone or in a batch, on any device.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimode.decoding.interface import DraftHead, Generation, Rows, TokenLogprob, sent
from trimode.decoding.settings import Settings

__all__ = [
    "adjusted",
    "best_tokens",
    "draft_tokens",
    "fill_from_left",
    "likeliest",
    "next_token",
    "pick",
    "scores_after",
    "token_logprobs",
    "truncated_distribution",
    "uniform",
    "verify",
    "verify_and_draft",
]


def adjusted(
    logits: Float[Tensor, "T V"], generation: Generation, history: Sequence[int] | None = None
) -> Float[Tensor, "T V"]:
    """Logits in float32 with the mask excluded and bias and penalties applied. `history`: prompt and answer as the penalties
    see them, the generation's final tokens if None."""
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
        scores = out[:, seen]
        p = settings.repetition_penalty
        out[:, seen] = torch.where(scores > 0, scores / p, scores * p)
    if settings.presence_penalty or settings.frequency_penalty:
        answer = (generation.final if history is None else history)[len(generation.prompt) :]
        said, times = torch.tensor(list(answer), dtype=torch.long).unique(return_counts=True)
        less = settings.presence_penalty + settings.frequency_penalty * times.to(out.dtype)
        out[:, sent(said, out.device)] -= sent(less, out.device)
    return out


def best_tokens(rows: Rows, generation: Generation, history: Sequence[int] | None = None) -> list[int]:
    """The arg-max of each row's adjusted logits."""
    settings = generation.settings
    if rows.best is not None and not settings.has_penalty and not settings.logit_bias:
        return list(rows.best)
    return adjusted(rows.logits, generation, history).argmax(dim=-1).tolist()


def likeliest(rows: Rows, generation: Generation, history: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The arg-max of each row's adjusted logits, and how probable it is, both where they were found."""
    settings = generation.settings
    if rows.best is not None and not settings.has_penalty and not settings.logit_bias:
        return torch.tensor(rows.best), rows.probabilities(rows.best)
    tokens = adjusted(rows.logits, generation, history).argmax(dim=-1)
    return tokens, rows.probabilities(tokens)


def scores_after(logits: Float[Tensor, "1 V"], generation: Generation, history: Sequence[int]) -> Float[Tensor, "1 V"]:
    """Adjusted logits of the place behind this very history, without what the request's constraint forbids there."""
    scores = adjusted(logits, generation, history)
    if generation.constraint is not None:
        allowed = generation.constraint.allowed(history[len(generation.prompt) :])
        scores.masked_fill_(sent(~allowed, scores.device), float("-inf"))
    return scores


def token_logprobs(tokens: Sequence[int], rows: Rows, generation: Generation) -> tuple[TokenLogprob, ...]:
    """Each token's log-probability by its row of logits as the model gave them; nothing if the request does not ask."""
    num_best = generation.settings.logprobs
    if num_best is None:
        return ()
    logprobs = rows.logits[: len(tokens)].float().log_softmax(dim=-1)
    values, ids = logprobs.topk(num_best, dim=-1)
    own = logprobs.gather(-1, sent(tokens, logprobs.device, torch.long)[:, None])
    told = torch.cat((own.double(), values.double(), ids.double()), dim=-1).tolist() if len(tokens) else []
    return tuple(
        TokenLogprob(token, row[0], tuple(zip(map(int, row[1 + num_best :]), row[1 : 1 + num_best], strict=True)))
        for token, row in zip(tokens, told, strict=True)
    )


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


def next_token(row: Rows, generation: Generation) -> int:
    """The autoregressive choice after everything final, from one row."""
    return _choose(row, generation, generation.final)


def _choose(row: Rows, generation: Generation, history: Sequence[int]) -> int:
    forced = forced_token(generation, history)
    if forced is not None:
        return forced
    if generation.settings.temperature == 0 and generation.constraint is None:
        return best_tokens(row, generation, history)[0]
    scores = scores_after(row.logits, generation, history)
    if generation.settings.temperature == 0:
        return int(scores.argmax(dim=-1))
    return int(pick(truncated_distribution(scores, generation.settings), uniform(generation)))


def draft_tokens(rows: Rows, generation: Generation, *before: int) -> tuple[list[int], Tensor | None]:
    """Tentative tokens for masked places, and the distributions that they were drawn from: None if they are arg-maxima.
    `before`: tokens that become final in this step and precede the places."""
    settings = generation.settings
    history = [*generation.final, *before]
    head = _draft_head(rows, generation)
    is_plain = generation.constraint is None and not settings.has_penalty and not settings.logit_bias
    if settings.temperature == 0 and is_plain:
        if head is None:
            return best_tokens(rows, generation), None
        return head.draft(rows.hidden, rows.logits, history[-1])[0], None
    if generation.constraint is not None or (head is not None and settings.has_penalty):
        return _draft_in_order(rows, head, generation, history)
    u = uniform(generation, len(rows)) if settings.temperature > 0 else None
    tokens, q = _drafted(rows, head, generation, history[-1], u)
    return tokens.tolist(), q


def verify_and_draft(
    drafts: Sequence[int], q: Tensor | None, rows: Rows, ahead: Rows, generation: Generation
) -> tuple[list[int], list[int], Tensor | None]:
    """What `verify` makes final, and what `draft_tokens` makes of the masks behind it: of the rows `ahead`, as many for each way that
    the verification may end. Where they lie on a device all is read at once."""
    head = _draft_head(ahead, generation)
    settings = generation.settings
    needs_logits = settings.temperature > 0 or settings.has_penalty or bool(settings.logit_bias)
    is_told = rows.best is not None and not needs_logits
    in_order = not _may_be_judged_at_once(generation) or (head is not None and settings.has_penalty)
    if is_told or in_order or rows.logits.device.type == "cpu":
        committed = verify(drafts, q, rows, generation)
        per_group = len(ahead) // (len(drafts) + 1)
        start = (len(committed) - 1) * per_group
        return committed, *draft_tokens(ahead[start : start + per_group], generation, *committed)
    return _verified_there(drafts, q, rows, ahead, generation)


def _verified_there(
    drafts: Sequence[int], q: Tensor | None, rows: Rows, ahead: Rows, generation: Generation
) -> tuple[list[int], list[int], Tensor | None]:
    """`verify_and_draft` where the logits lie, read at once. ahead: none, if nothing is to be drafted."""
    n = len(drafts)
    per_group = len(ahead) // (n + 1)
    before = generation.random.get_state()
    u = (
        sent(uniform(generation, n + 1 + per_group), rows.logits.device)
        if generation.settings.temperature > 0
        else None
    )
    accepted, others = _judged(drafts, q, rows, generation, u)
    num = accepted.long().cumprod(dim=0).sum().view(1)
    read = [num, others.index_select(0, num)]
    q_ahead = None
    if per_group:
        step = torch.arange(per_group, device=num.device)
        group = num * per_group + step
        own = Rows(
            ahead.logits.index_select(0, group),
            hidden=None if ahead.hidden is None else ahead.hidden.index_select(0, group),
            draft_head=ahead.draft_head,
        )
        u_ahead = None if u is None else u.index_select(0, (num + 2).clamp(max=n + 1) + step)
        tokens, q_ahead = _drafted(own, _draft_head(own, generation), generation, read[1], u_ahead)
        read.append(tokens)
    num_accepted, bonus, *new = torch.cat(read).tolist()
    if u is not None:
        # as many random numbers are used up as place by place
        generation.random.set_state(before)
        uniform(generation, min(num_accepted + 2, n + 1) + per_group)
    return [*drafts[:num_accepted], bonus], new, q_ahead


def _may_be_judged_at_once(generation: Generation) -> bool:
    """Whether nothing has to be asked, token by token, before it is known what a row comes to."""
    return generation.constraint is None and generation.settings.max_thinking_tokens is None


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
    rows: Rows, head: DraftHead | None, generation: Generation, before: int | Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`draft_tokens`, unread and with random numbers given, for rows that stand alone. before: the token that precedes them, which may
    lie where they do."""
    if head is None:
        return _likeliest_or_drawn(adjusted(rows.logits, generation), generation, u)
    if u is None and not generation.settings.logit_bias:
        return head.drafted(rows.hidden, rows.logits, before)[0].long(), None
    tokens, distributions = [], []
    for j in range(len(rows)):
        own = slice(j, j + 1)
        logits = head.rescored(rows.hidden[own], rows.logits[own], before)
        before, q = _likeliest_or_drawn(adjusted(logits, generation), generation, None if u is None else u[own])
        tokens.append(before)
        distributions.append(q)
    if not tokens:
        return torch.empty(0, dtype=torch.long, device=rows.logits.device), None
    return torch.cat(tokens), None if u is None else torch.cat(distributions)


def _draft_in_order(
    rows: Rows, head: DraftHead | None, generation: Generation, history: list[int]
) -> tuple[list[int], Tensor | None]:
    """Drafts place by place, each knowing what was drafted before it: what a constraint forbids there is never drafted."""
    tokens: list[int] = []
    distributions = []
    for j in range(len(rows)):
        logits = rows.logits[j : j + 1]
        if head is not None:
            logits = head.rescored(rows.hidden[j : j + 1], logits, (history + tokens)[-1])
        scores = scores_after(logits, generation, history + tokens)
        if generation.settings.temperature == 0:
            tokens.append(int(scores.argmax(dim=-1)))
        else:
            q = truncated_distribution(scores, generation.settings)
            tokens.append(int(pick(q, uniform(generation))))
            distributions.append(q)
    return tokens, torch.cat(distributions) if distributions else None


def fill_from_left(
    logits: Float[Tensor, "T V"],
    generation: Generation,
    history: Sequence[int],
    threshold: float,
    *,
    all_of_it: bool = False,
) -> tuple[list[int], list[float]]:
    """Tokens for the places behind this history under a constraint, as far from the left as each reaches the threshold; one at
    least. Also how sure each was, among what the constraint allows."""
    tokens: list[int] = []
    sure: list[float] = []
    for j in range(len(logits)):
        scores = scores_after(logits[j : j + 1], generation, [*history, *tokens])
        if generation.settings.temperature == 0:
            token = int(scores.argmax(dim=-1))
        else:
            token = int(pick(truncated_distribution(scores, generation.settings), uniform(generation)))
        confidence = float(scores.softmax(dim=-1)[0, token])
        if tokens and confidence < threshold and not all_of_it:
            break
        tokens.append(token)
        sure.append(confidence)
    return tokens, sure


def verify(
    drafts: Sequence[int],
    q: Float[Tensor, "T V"] | None,
    rows: Rows,
    generation: Generation,
    *,
    at_once: bool | None = None,
) -> list[int]:
    """The tokens that follow `generation.final`: the accepted run of drafts and one more, distributed exactly as if each had been
    drawn from the causal logits one by one. Row i predicts drafts[i]; the last row follows all of them.

    Greedy: a draft is accepted if it is the arg-max. Sampled (arXiv 2211.17192): draft x is accepted with probability
    min(1, p(x) / q(x)), else a token is drawn from the positive part of p - q. Without `q` a draft counts as certain (q = 1 at x):
    exact for any draft however it was made, as long as these random numbers had no part in it.

    at_once: all places are looked at together, which waits once for a device; None: where logits lie on one. Else no place is looked at
    behind a rejection. Tokens and random numbers are the same either way.
    """
    settings = generation.settings
    history = list(generation.final)
    start = len(history)
    stand_alone = _may_be_judged_at_once(generation)
    if settings.temperature == 0 and not settings.has_penalty and stand_alone:
        best = best_tokens(rows, generation)
        num = 0
        while num < len(drafts) and drafts[num] == best[num]:
            num += 1
        return best[: num + 1]
    if stand_alone and (rows.logits.device.type != "cpu" if at_once is None else at_once):
        return _verified_there(drafts, q, rows, rows[:0], generation)[0]
    for i in range(len(drafts) + 1):
        draft = drafts[i] if i < len(drafts) else None
        if settings.temperature == 0 or draft is None or forced_token(generation, history) is not None:
            token = _choose(rows[i : i + 1], generation, history)
        else:
            p = truncated_distribution(scores_after(rows.logits[i : i + 1], generation, history), settings)[0]
            token = _accept_or_redraw(draft, p, None if q is None else q[i], generation)
        history.append(token)
        if token != draft:
            break
    return history[start:]


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
    drafts: Sequence[int], q: Tensor | None, rows: Rows, generation: Generation, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For each draft whether it is accepted if those before it are [n], and what stands in its place if not, or behind all of them
    [n + 1]. Of the random numbers u place i takes the i-th to accept its draft, the next one to draw another token; None: greedy."""
    n, device = len(drafts), rows.logits.device
    places = sent(drafts, device, torch.long)
    if generation.settings.has_penalty:
        histories = [[*generation.final, *drafts[:i]] for i in range(n + 1)]
        scores = torch.cat([adjusted(rows.logits[i : i + 1], generation, histories[i]) for i in range(n + 1)])
    else:
        scores = adjusted(rows.logits, generation)
    others, p = _likeliest_or_drawn(scores, generation, u if u is None else u[: n + 1])
    if u is None or p is None:
        return others[:n] == places, others
    p_draft = p[:n].gather(-1, places[:, None])[:, 0]
    if q is None:
        accepted, residual = u[:n] < p_draft, p[:n].scatter(-1, places[:, None], 0.0)
    else:
        accepted = u[:n] * q.gather(-1, places[:, None])[:, 0] < p_draft
        residual = (p[:n] - q).clamp(min=0.0)
    # nothing is left: p equals q up to rounding, and the draft is as good a draw as any
    accepted |= residual.sum(dim=-1) <= 0.0
    return accepted, pick(torch.cat([residual, p[n:]]), torch.cat([u[1 : n + 1], u[n : n + 1]]))
