"""`diffusion`: fill several masked places of a block in each forward, from both sides, over a causal prefix (arXiv 2607.05722).

A block starts with its anchor, which the causal view of what is final predicts; it is final at once. The places after it are the
canvas. Denoising steps fill them, surest first, and may revise what they filled; nothing of a block is cached until it is full, when
one causal step over it writes its keys and gives the next anchor. `Infill` uses the same steps on a canvas with fixed tokens in it.

Where the first place of a block is exact (`Traits.first_is_exact`) no forward is spent on anchors and keys alone: a block is all masks,
every step fills its leftmost one with the autoregressive choice, and what then leads the canvas without a gap is final. Greedy, with a
draft head, what is too unsure to be final is tried: the next step reads it as text, and keeps what the causal view would have said too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from trimode.decoding.autoregressive import causal_step
from trimode.decoding.interface import (
    DraftHead,
    Generation,
    OneByOne,
    Outcome,
    Predictions,
    Rows,
    Step,
    TokenLogprob,
    Traits,
    sent,
)
from trimode.decoding.reading import Reading
from trimode.decoding.sampling import (
    adjusted,
    fill_from_left,
    likeliest,
    logprob_tables,
    next_token,
    pick,
    token_logprobs,
    told_logprobs,
    truncated_distribution,
    uniform,
    verify,
)
from trimode.decoding.settings import Settings
from trimode.decoding.unmasking import POLICIES, Candidates, quota
from trimode.model.views import Bidirectional, BlockOverCausal, Causal

__all__ = ["LONGEST_MIXED_PREFILL", "BlockDiffusion", "Infill", "Progress", "block_step", "denoise", "length_of_block"]

LONGEST_MIXED_PREFILL = 512
"""A longer prompt is read by a causal step of its own: one forward more, but no square of its length as a mask in memory."""

DEFAULT_THRESHOLD = 0.9
DEFAULT_ENTROPY_BOUND = 0.1
WORTH_TRYING = 0.25
"""How sure a place must be, if those before it are right, to be tried. Where it is wrong a step gives one token; where nothing is
tried it gives about 1.3: trying pays from a chance of 0.3 / 1.3 on."""


@dataclass(slots=True)
class Progress:
    """Where the denoising of one block stands."""

    num_masked: int
    """Masks that it started with."""
    num_steps: int
    """Passes that may fill; the last of them fills all that is left."""
    fixed: frozenset[int] = frozenset()
    """Places of the canvas that never change."""
    banned: tuple[int, ...] = ()
    """Tokens that may not fill a place."""
    step: int = 0
    post_step: int = 0
    settled: bool = False
    """The last revising pass changed nothing."""
    confidence: dict[int, float] = field(default_factory=dict)
    """Of each filled place, when it was filled."""
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    """The same, where the request asks for them."""
    tried: tuple[int, ...] = ()
    """Tokens that the next step reads at the canvas's first places, to see whether the causal view agrees. The canvas has masks
    there."""


def length_of_block(generation: Generation) -> int:
    """What `auto` chose, the request's block length, or the checkpoint's."""
    if generation.choice is not None:
        return generation.choice.block_length
    return generation.settings.block_length or generation.traits.block_length


def block_step(generation: Generation, kind: str, canvas: Sequence[int], places: Sequence[int], adapter: str) -> Step:
    """A forward over the uncached final tokens and the canvas behind them, asking for these places of the canvas."""
    known = generation.uncached
    tokens = known + tuple(canvas)
    view = BlockOverCausal(len(known)) if generation.traits.known_tokens_are_causal else Bidirectional()
    mask = generation.traits.mask_token_id
    adapted: tuple[int, ...] = ()
    if adapter == "all":
        adapted = tuple(range(len(tokens)))
    elif adapter == "masks":
        adapted = tuple(len(known) + i for i, token in enumerate(canvas) if token == mask)
    at = tuple(len(known) + place for place in places)
    return Step(kind=kind, tokens=tokens, view=view, at=at, adapted=adapted)


def places_asked(generation: Generation, progress: Progress) -> list[int]:
    """Places of the canvas that the next denoising step predicts: the masked ones, and with revision every one that may change."""
    mask = generation.traits.mask_token_id
    masked = [i for i, token in enumerate(generation.canvas) if token == mask]
    if generation.settings.editing_threshold is None or (generation.traits.first_is_exact and masked):
        return masked
    return [i for i in range(len(generation.canvas)) if i not in progress.fixed]


def denoise(generation: Generation, progress: Progress, rows: Rows) -> Reading[int]:
    """Fill and revise the canvas from the rows of `places_asked`. Returns how many tokens were revised."""
    traits, canvas = generation.traits, generation.canvas
    places = places_asked(generation, progress)
    if generation.constraint is not None:
        yield from _fill_in_order(generation, progress, places, rows)
        return 0
    tokens, confidence = _choices(generation, progress, places, rows)

    masked = [j for j, place in enumerate(places) if canvas[place] == traits.mask_token_id]
    taken = _sure_enough(generation, confidence)
    if masked:
        chosen = _chosen(generation, progress, [places[j] for j in masked], masked, tokens, confidence, rows)
        taken = chosen if len(masked) == len(places) else taken.index_copy(0, sent(masked, taken.device), chosen)
    chosen_tokens, how_sure, takes, *tables = yield [
        tokens,
        confidence,
        taken,
        *logprob_tables(tokens, rows, generation),
    ]
    logprobs = told_logprobs(chosen_tokens, tables)
    filling = set(masked)
    revised = 0
    for j, (place, token, sure, take) in enumerate(zip(places, chosen_tokens, how_sure, takes, strict=True)):
        if not take or token == canvas[place]:
            continue
        if j not in filling:
            # behind a wrong token the causal view doubts what was right: where that view revises, one token a pass
            if revised and traits.first_is_exact:
                continue
            revised += 1
        canvas[place] = token
        progress.confidence[place] = sure
        if logprobs:
            progress.logprobs[place] = logprobs[j]
    if masked:
        progress.step += 1
    else:
        progress.post_step += 1
        progress.settled = revised == 0
    return revised


def _choices(generation: Generation, progress: Progress, places: list[int], rows: Rows) -> tuple[Tensor, Tensor]:
    """A token for each of these places, and how sure each is; both where that was found."""
    settings, traits = generation.settings, generation.traits
    head = rows.draft_head if traits.first_is_exact and traits.adapter_on_denoise == "masks" else None
    is_greedy = (
        settings.temperature == 0 and not settings.has_penalty and not settings.logit_bias and not progress.banned
    )
    if head is not None and is_greedy and traits.mask_token_id in generation.canvas:
        return _linked_choices(generation, places, rows, head)
    # how sure: as the reference, the untempered softmax with the mask in it, rounded to the model's dtype
    if is_greedy:
        return likeliest(rows, generation)
    tokens = _chosen_tokens(generation, progress, places, rows)
    return tokens, rows.probabilities(tokens)


def _linked_choices(generation: Generation, places: list[int], rows: Rows, head: DraftHead) -> tuple[Tensor, Tensor]:
    """The same for masked places, each chosen behind the one before it. Masks in a row are as sure as all of them up to there."""
    best, sure = likeliest(rows, generation)
    tokens = best.clone()
    starts = [j for j, place in enumerate(places) if j == 0 or place != places[j - 1] + 1]
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        if places[start] == 0:
            # exact, and needs no second thought; what follows it hangs on it
            before, first = sent(tokens[start : start + 1], rows.logits.device), start + 1
        else:
            before, first = generation.canvas[places[start] - 1], start
        if first < end:
            own = slice(first, end)
            drafts, probabilities = head.drafted(rows.hidden[own], rows.logits[own], before)
            # rounded at the end, so that it is the same wherever it is reckoned
            tokens[own], sure[own] = drafts.long(), probabilities.cumprod(dim=0).to(sure.dtype)
    return tokens, sure


def _chosen_tokens(generation: Generation, progress: Progress, places: list[int], rows: Rows) -> Tensor:
    """A token for each of these places, where the logits lie."""
    settings, canvas, mask = generation.settings, generation.canvas, generation.traits.mask_token_id
    history = [*generation.final, *(token for token in canvas if token != mask)]
    scores = adjusted(rows.logits, generation, history)
    if settings.has_penalty:
        for j, place in enumerate(places):
            if canvas[place] != mask:
                # what stands at a place is no repetition of itself
                others = [t for i, t in enumerate(canvas) if i != place and t != mask]
                scores[j : j + 1] = adjusted(rows.logits[j : j + 1], generation, [*generation.final, *others])
    if progress.banned:
        scores.index_fill_(1, sent(progress.banned, scores.device), float("-inf"))
    if settings.temperature == 0:
        return scores.argmax(dim=-1)
    return pick(truncated_distribution(scores, settings), uniform(generation, len(places)))


def _fill_in_order(generation: Generation, progress: Progress, places: list[int], rows: Rows) -> Reading[None]:
    """Under a constraint a block fills from the left: what may stand at a place hangs on all that stands before it."""
    given = generation.settings.threshold
    history = [*generation.final, *generation.canvas[: places[0]]]
    tokens, sure, logprobs = yield from fill_from_left(
        rows,
        generation,
        history,
        DEFAULT_THRESHOLD if given is None else given,
        all_of_it=progress.step + 1 >= progress.num_steps,
    )
    filled = places[: len(tokens)]
    for place, token, confidence in zip(filled, tokens, sure, strict=True):
        generation.canvas[place] = token
        progress.confidence[place] = confidence
    progress.logprobs.update(zip(filled, logprobs, strict=False))
    progress.step += 1


def _logprobs_of(generation: Generation, progress: Progress, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Of the leading tokens of the canvas. One that was put there and not chosen is certain."""
    if generation.settings.logprobs is None:
        return ()
    return tuple(progress.logprobs.get(i, TokenLogprob(token, 0.0)) for i, token in enumerate(tokens))


def _sure_enough(generation: Generation, confidence: Tensor) -> Tensor:
    """Of these places: where another token may replace what stands there."""
    bound = generation.settings.editing_threshold
    if bound is None:
        return torch.zeros_like(confidence, dtype=torch.bool)
    # in the confidence's own dtype, as the reference
    return confidence >= torch.full((), bound, dtype=confidence.dtype, device=confidence.device)


def _chosen(
    generation: Generation,
    progress: Progress,
    places: list[int],
    which: list[int],
    tokens: Tensor,
    confidence: Tensor,
    rows: Rows,
) -> Tensor:
    """Of these masked places, whose rows are `which`: those that are filled now."""
    settings = generation.settings
    if len(which) < len(rows):
        index = sent(which, confidence.device)
        tokens, confidence, rows = tokens[index], confidence[index], rows[which]
    if progress.step + 1 >= progress.num_steps:
        return torch.ones_like(confidence, dtype=torch.bool)
    is_exact = generation.traits.first_is_exact and places[0] == 0
    if is_exact:
        # it is filled in any case, so a policy that fills one place at least shall find no other instead
        confidence = torch.cat((torch.ones_like(confidence[:1]), confidence[1:]))
    candidates = Candidates(
        confidence=confidence,
        scores=rows.logits.float if not is_exact else lambda: _certain_first(rows.logits.float(), tokens),
        quota=quota(progress.num_masked, progress.num_steps, progress.step),
        threshold=DEFAULT_THRESHOLD if settings.threshold is None else settings.threshold,
        entropy_bound=DEFAULT_ENTROPY_BOUND if settings.entropy_bound is None else settings.entropy_bound,
        random=generation.random,
    )
    chosen = POLICIES[settings.unmasking](candidates)
    if is_exact:
        chosen[0] = True
    return chosen.to(confidence.device)


def _certain_first(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores by which the first place can only be the first of these tokens."""
    first = torch.full_like(scores[:1], float("-inf"))
    first.scatter_(1, sent(tokens[:1], scores.device)[:, None], 0.0)
    return torch.cat((first, scores[1:]))


def wants_revision(generation: Generation, progress: Progress) -> bool:
    """Whether a full canvas gets another pass that only revises."""
    settings = generation.settings
    if settings.editing_threshold is None or progress.settled:
        return False
    # an exact first place: only passes over a full canvas revise, so there is one at least
    return progress.post_step < max(settings.max_post_steps, generation.traits.first_is_exact)


class BlockDiffusion(OneByOne):
    """Anchor, denoising steps, commit: block after block. With an exact first place: denoising steps alone."""

    def plan_one(self, g: Generation) -> Step:
        if g.state is None and g.traits.first_is_exact and len(g.uncached) <= LONGEST_MIXED_PREFILL:
            self._start_block(g, length_of_block(g))
        if g.state is None:
            return causal_step(g, "commit")
        if g.traits.first_is_exact:
            return _exact_step(g)
        kind = "denoise" if g.traits.mask_token_id in g.canvas else "revise"
        places = places_asked(g, g.state)
        return block_step(g, kind, g.canvas, places, g.traits.adapter_on_denoise)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        if g.state is None:
            return (yield from self._absorb_anchor(g, step, predictions.after))
        progress: Progress = g.state
        if g.traits.first_is_exact and predictions.after.draft_head is not None and _may_try(g):
            return (yield from self._check_and_try(g, predictions.after, predictions.after.draft_head))
        if g.traits.first_is_exact:
            return _commit_lead(g, step, (yield from denoise(g, progress, predictions.after)))
        revised = yield from denoise(g, progress, predictions.at)
        num_needed = _num_needed(g)
        if g.traits.mask_token_id in g.canvas[:num_needed] or wants_revision(g, progress):
            return Outcome(revised=revised)
        committed = tuple(g.canvas[:num_needed])
        sure = tuple(progress.confidence.get(i, 1.0) for i in range(num_needed))
        told = _logprobs_of(g, progress, committed)
        g.canvas, g.state = [], None
        return Outcome(committed=committed, probabilities=sure, logprobs=told, revised=revised)

    def _absorb_anchor(self, g: Generation, step: Step, row: Rows) -> Reading[Outcome]:
        anchor, told = yield from next_token(row, g)
        # where the first place is exact, blocks start in `plan_one`
        given = () if g.traits.first_is_exact else self._start_block(g, length_of_block(g) - 1, anchor)
        if told:
            told += tuple(TokenLogprob(token, 0.0) for token in given)
        return Outcome(committed=(anchor, *given), kept=len(step.tokens), logprobs=told)

    def _check_and_try(self, g: Generation, rows: Rows, head: DraftHead) -> Reading[Outcome]:
        """Commit what was tried as far as the causal view says the same, its own choice behind that, and what is sure behind all that
        was tried. What is less sure is tried next."""
        found = yield from (_read_at_once if rows.lie_on_device else _read_as_needed)(g.state.tried, rows, head, g)
        committed, sure = found.committed, found.sure
        num_right = len(committed) - 1
        g.canvas, g.state = [], None
        if found.drafts and not g.ends_with(committed[-1]):
            together = list(accumulate(found.probabilities, mul))
            bound = DEFAULT_THRESHOLD if g.settings.threshold is None else g.settings.threshold
            num_sure = sum(p >= bound for p in together)
            committed += found.drafts[:num_sure]
            sure += together[:num_sure]
            unsure = takewhile(lambda j: found.probabilities[j] >= WORTH_TRYING, range(num_sure, len(found.drafts)))
            self._start_block(g, length_of_block(g))
            g.state.tried = tuple(found.drafts[j] for j in unsure)[: len(g.canvas) - 1]
        told = found.logprobs[: len(committed)] or (yield from token_logprobs(committed, rows, g))
        kept = len(g.uncached) + num_right
        return Outcome(committed=tuple(committed), kept=kept, probabilities=tuple(sure), logprobs=told)

    def _start_block(self, g: Generation, num_places: int, *anchor: int) -> tuple[int, ...]:
        """Lay out the canvas. Returns it where nothing of it is masked, so that there is nothing to denoise."""
        if num_places == 0:
            return ()
        mask = g.traits.mask_token_id
        g.canvas = [mask] * num_places
        fixed = frozenset[int]()
        budget, end_think = g.settings.max_thinking_tokens, g.settings.end_think_token_id
        if budget is not None and end_think is not None:
            place = budget - g.num_new - len(anchor)
            if 0 <= place < len(g.canvas) and end_think not in (*g.new_tokens, *anchor):
                g.canvas[place] = end_think
                fixed = frozenset((place,))
        num_masked = g.canvas.count(mask)
        if num_masked == 0:
            # a block of two whose only place is `</think>`
            given, g.canvas = tuple(g.canvas), []
            return given
        num_steps = g.settings.max_denoising_steps or length_of_block(g)
        g.state = Progress(num_masked=num_masked, num_steps=num_steps, fixed=fixed)
        return ()

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length


class _Checked(NamedTuple):
    """What the causal view says as far as it agrees with what was tried, how sure it is, and the drafts behind all of that."""

    committed: list[int]
    sure: list[float]
    drafts: list[int]
    """None where something that was tried is wrong."""
    probabilities: list[float]
    """Of the drafts, each behind those before it."""
    logprobs: tuple[TokenLogprob, ...]
    """Of all of them, where that was read too."""


def _read_as_needed(tried: Sequence[int], rows: Rows, head: DraftHead, g: Generation) -> Reading[_Checked]:
    n = len(tried)
    committed, _ = yield from verify(tried, None, rows[: n + 1], g)
    (sure,) = yield [rows[: len(committed)].probabilities(committed)]
    drafts: list[int] = []
    probabilities: list[float] = []
    if n + 1 == len(committed) < len(rows) and not g.ends_with(committed[-1]):
        own = slice(n + 1, len(rows))
        drafts, probabilities = head.draft(rows.hidden[own], rows.logits[own], committed[-1])
    return _Checked(committed, sure, drafts, probabilities, ())


def _read_at_once(tried: Sequence[int], rows: Rows, head: DraftHead, g: Generation) -> Reading[_Checked]:
    """On a device one wait, where nothing is saved by not drafting behind what turns out wrong."""
    n = len(tried)
    best, sure = likeliest(rows[: n + 1], g)
    drafted = head.drafted(rows.hidden[n + 1 :], rows.logits[n + 1 :], best[n:])
    all_tokens = torch.cat((best, drafted[0].long()))
    tokens, how_sure, probabilities, *tables = yield [
        all_tokens,
        sure,
        drafted[1],
        *logprob_tables(all_tokens, rows, g),
    ]
    num_right = next((i for i in range(n) if tokens[i] != tried[i]), n)
    drafts = tokens[n + 1 :] if num_right == n else []
    return _Checked(
        tokens[: num_right + 1], how_sure[: num_right + 1], drafts, probabilities, told_logprobs(tokens, tables)
    )


def _may_try(g: Generation) -> bool:
    """Whether this step may check what was tried, and the next one try: a greedy choice that hangs on nothing but the text before it,
    and passes that nobody counts."""
    s = g.settings
    return (
        s.temperature == 0
        and not s.has_penalty
        and not s.logit_bias
        and g.constraint is None
        and s.editing_threshold is None
        and s.max_denoising_steps is None
        and s.max_thinking_tokens is None
        and s.unmasking == "threshold"
        and all(token == g.traits.mask_token_id for token in g.canvas)
    )


def _exact_step(g: Generation) -> Step:
    """The final tokens and the canvas, asking after what stands before each place that is to be predicted.

    A full canvas is revised through the causal view: that is where such a model knows what it would have said.
    """
    known = g.uncached
    mask = g.traits.mask_token_id
    places = places_asked(g, g.state)
    after = tuple(len(known) - 1 + place for place in places)
    # with revision nothing is cached before its block is full: later passes read the prompt again, and are no prefill
    kind = "prefill" if g.cached < len(g.prompt) and g.state.step == 0 else "denoise"
    if mask not in g.canvas:
        return Step(kind="revise", tokens=known + tuple(g.canvas), view=Causal(), after=after)
    tried = g.state.tried
    # a mask at the end would only predict what lies beyond the block
    canvas = [*tried, *(g.canvas[len(tried) : -1] if g.canvas[-1] == mask else g.canvas[len(tried) :])]
    tokens = known + tuple(canvas)
    adapted: tuple[int, ...] = ()
    if g.traits.adapter_on_denoise == "masks":
        adapted = tuple(len(known) + i for i, token in enumerate(canvas) if token == mask)
    return Step(
        kind=kind,
        tokens=tokens,
        view=BlockOverCausal(len(known) + len(tried)),
        after=after,
        adapted=adapted,
    )


def _commit_lead(g: Generation, step: Step, revised: int) -> Outcome:
    """Commit what leads the canvas without a gap; with revision, the whole canvas once it is full and settled."""
    progress: Progress = g.state
    mask = g.traits.mask_token_id
    num_known = len(g.uncached)
    num_lead = g.canvas.index(mask) if mask in g.canvas else len(g.canvas)
    if g.settings.editing_threshold is not None and _num_needed(g) < num_lead:
        # the text ends here: what lies behind is not worth a forward, even if the end should be revised away
        num_lead = _num_needed(g)
        g.canvas = g.canvas[:num_lead]
    if g.settings.editing_threshold is not None and (num_lead < len(g.canvas) or wants_revision(g, progress)):
        return Outcome(revised=revised)
    committed = tuple(g.canvas[:num_lead])
    sure = tuple(progress.confidence.get(i, 1.0) for i in range(num_lead))
    g.canvas = g.canvas[num_lead:]
    progress.confidence = {i - num_lead: value for i, value in progress.confidence.items() if i >= num_lead}
    told = _logprobs_of(g, progress, committed)
    progress.logprobs = {i - num_lead: value for i, value in progress.logprobs.items() if i >= num_lead}
    progress.fixed = frozenset(i - num_lead for i in progress.fixed if i >= num_lead)
    if not g.canvas or (g.settings.max_denoising_steps is None and all(token == mask for token in g.canvas)):
        # where nothing behind the lead is filled yet, a new block keeps as many masks in sight as there were at first
        g.canvas, g.state = [], None
    # a revising step that changed nothing was causal over what is final now; the last token leads the next block, uncached
    kept = len(step.tokens) - 1 if step.kind == "revise" and progress.settled else num_known
    return Outcome(committed=committed, kept=kept, probabilities=sure, logprobs=told, revised=revised)


def _num_needed(g: Generation) -> int:
    """Places of the canvas that will be text: up to the first end of text that nothing masked precedes, or to the token limit."""
    mask = g.traits.mask_token_id
    for i, token in enumerate(g.canvas):
        if token == mask:
            break
        if g.ends_with(token):
            return i + 1
    return min(len(g.canvas), g.num_left)


class Infill(OneByOne):
    """Fill the masked places of a canvas that holds fixed tokens too; the prompt is the text before the first of them.

    All is denoised as one block. The last token of the prompt is left uncached to lead the block, as an anchor does elsewhere.
    """

    def plan_one(self, g: Generation) -> Step:
        if len(g.uncached) > 1:
            return Step(kind="prefill", tokens=g.uncached, view=Causal())
        if g.state is None:
            mask = g.traits.mask_token_id
            fixed = frozenset(i for i, token in enumerate(g.canvas) if token != mask)
            num_masked = len(g.canvas) - len(fixed)
            # nothing that ends a text belongs into the middle of one
            banned = tuple(g.traits.eos_token_ids)
            num_steps = g.settings.max_denoising_steps or num_masked
            g.state = Progress(num_masked=num_masked, num_steps=num_steps, fixed=fixed, banned=banned)
        kind = "denoise" if g.traits.mask_token_id in g.canvas else "revise"
        return block_step(g, kind, g.canvas, places_asked(g, g.state), g.traits.adapter_on_denoise)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        if step.kind == "prefill":
            return Outcome(kept=len(step.tokens) - 1)
        progress: Progress = g.state
        revised = yield from denoise(g, progress, predictions.at)
        if g.traits.mask_token_id in g.canvas or wants_revision(g, progress):
            return Outcome(revised=revised)
        sure = tuple(progress.confidence.get(i, 1.0) for i in range(len(g.canvas)))
        told = _logprobs_of(g, progress, g.canvas)
        return Outcome(committed=tuple(g.canvas), probabilities=sure, logprobs=told, revised=revised)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return 0
