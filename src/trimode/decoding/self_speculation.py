"""`self_spec`: the block view drafts, the causal view of the same weights verifies; the text is exactly the autoregressive one.

Linear (arXiv 2607.05722, section 3): one forward drafts a block behind the last final token, one forward checks it; 2 forwards a
round. Quadratic (appendix C; 2511.08923): one forward checks a draft and at the same time drafts the next block for every way the
check may end; 1 forward a round, B * (B + 1) inputs wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.decoding.autoregressive import causal_step, one_token
from trimode.decoding.block_diffusion import LONGEST_MIXED_PREFILL, block_step, length_of_block
from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Rows, Step, TokenLogprob, Traits
from trimode.decoding.reading import Reading
from trimode.decoding.sampling import (
    adjusted,
    draft_tokens,
    fill_from_left,
    likeliest,
    logprob_tables,
    told_logprobs,
    unread_token,
    verify,
    verify_and_draft,
)
from trimode.decoding.settings import Settings
from trimode.decoding.unmasking import POLICIES, Candidates
from trimode.model.views import BlockOverCausal, Causal, VerifyAndPredraft

__all__ = [
    "Draft",
    "LinearSelfSpeculation",
    "QuadraticSelfSpeculation",
    "absorb_verification",
    "drafts_adapt",
    "verify_step",
]


NEWS = 0.25
"""Weight of a round in the mean of what was lately accepted."""
AHEAD = 2
"""Drafts beyond that mean, where drafts adapt. Counted on 40 prompts of Spec-Bench: 2 makes 0.96 of the tokens a forward of blocks of 8
at 1.38 times their speed."""


@dataclass(slots=True)
class Draft:
    """A drafted block behind the last final token; its tokens are the generation's canvas."""

    q: Tensor | None = None
    """Distributions that the tokens were drawn from [T, V]; None: greedy, or drafted in several passes."""


class LinearSelfSpeculation(OneByOne):
    """Draft, verify, draft, verify.

    Where the first place of a block is exact, the draft commits it, and may read the prompt too: no forward serves one token alone.
    """

    def plan_one(self, g: Generation) -> Step:
        mask = g.traits.mask_token_id
        length = _length_of_draft(g)
        if g.state is None:
            exact = g.traits.first_is_exact
            readable = len(g.uncached) <= LONGEST_MIXED_PREFILL if exact else len(g.uncached) == 1
            # one token is left, or the block has room for the anchor only: a draft would save nothing
            if not readable or (g.cached < len(g.prompt) and not exact) or g.num_left == 1 or length == 1:
                return causal_step(g, "verify")
            if exact:
                length = min(length, g.num_left)  # what lies behind the answer's end need not be drafted
            g.canvas = [mask] * (length - 1)
            g.state = Draft()
            if exact:
                return _draft_after(g, length - 1)
        places = [i for i, token in enumerate(g.canvas) if token == mask]
        if places:
            return block_step(g, "draft", g.canvas, places, g.traits.adapter_on_draft)
        return verify_step(g)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        if g.state is None:
            return (yield from one_token(g, predictions.after, len(step.tokens)))
        draft: Draft = g.state
        if step.at:
            yield from _fill_draft(g, draft, predictions.at)
            return Outcome()
        if g.traits.mask_token_id in g.canvas:
            num_known = step.view.num_causal(len(step.tokens))
            return (yield from _token_and_draft(g, predictions.after[:1], predictions.after[1:], num_known))
        outcome = yield from absorb_verification(g, predictions.after)
        g.lately_accepted += NEWS * ((outcome.accepted or 0) - g.lately_accepted)
        return outcome

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length


def drafts_adapt(g: Generation) -> bool:
    """Whether its linear rounds have blocks as long as lately paid. A seeded answer must not hang on where it is made."""
    s = g.settings
    is_set = (
        s.block_length is not None or s.threshold or g.choice is not None or (s.temperature > 0 and s.seed is not None)
    )
    return g.traits.drafts_adapt and not is_set


def _length_of_draft(g: Generation) -> int:
    """Of a linear round's block. Its anchor is one of it."""
    length = length_of_block(g)
    return min(length, 1 + round(g.lately_accepted + AHEAD)) if drafts_adapt(g) else length


def _token_and_draft(g: Generation, row: Rows, ahead: Rows, kept: int) -> Reading[Outcome]:
    """A step that gives one token of the causal view, and drafts behind it."""
    if g.settings.threshold:
        return (yield from _token_and_sure_drafts(g, row, ahead, kept))
    found = yield from verify_and_draft([], None, row, ahead, g)
    g.canvas, g.state = found.drafts, Draft(q=found.q)
    return Outcome(committed=tuple(found.committed), kept=kept, logprobs=found.logprobs)


def _token_and_sure_drafts(g: Generation, row: Rows, ahead: Rows, kept: int) -> Reading[Outcome]:
    """The same, where only sure drafts are taken."""
    # drafts under a constraint hang on the token itself, and wait for it
    token = None if g.constraint is not None else unread_token(row, g, g.final)
    if not isinstance(token, Tensor):
        outcome = yield from one_token(g, row, kept)
        yield from _fill_draft(g, g.state, ahead, *outcome.committed)
        return outcome
    counts = None
    if g.settings.has_penalty:
        counts = torch.zeros(row.logits.shape[-1], device=token.device).index_fill(0, token, 1.0)
    committed, taken, *tables = yield [token, _sure_drafts(g, ahead, [], counts), *logprob_tables(token, row, g)]
    _take(g, taken)
    return Outcome(committed=tuple(committed), kept=kept, logprobs=told_logprobs(committed, tables))


def verify_step(g: Generation) -> Step:
    """The draft at hand behind the last final token, causal."""
    tokens = g.uncached + tuple(g.canvas)
    return Step(kind="verify", tokens=tokens, view=Causal(), after=tuple(range(len(tokens))))


def absorb_verification(g: Generation, rows: Rows) -> Reading[Outcome]:
    """What such a step made of the draft. The bonus token is final but not cached: it leads the next one."""
    committed, logprobs = yield from verify(g.canvas, g.state.q, rows, g)
    g.canvas, g.state = [], None
    return _verified(committed, logprobs)


def _verified(committed: list[int], logprobs: tuple[TokenLogprob, ...]) -> Outcome:
    """What a verification made final: the drafts that it accepted and one more."""
    return Outcome(committed=tuple(committed), kept=len(committed), accepted=len(committed) - 1, logprobs=logprobs)


def _draft_after(g: Generation, num_masks: int) -> Step:
    """The final tokens, causal, and masks behind them: predictions after the last token and after each mask."""
    known = g.uncached
    tokens = known + (g.traits.mask_token_id,) * num_masks
    masks = tuple(range(len(known), len(tokens)))
    return Step(
        kind="prefill" if g.cached < len(g.prompt) else "draft",
        tokens=tokens,
        view=BlockOverCausal(len(known)),
        after=(len(known) - 1, *masks),
        adapted=() if g.traits.adapter_on_draft == "none" else masks,
    )


def _fill_draft(g: Generation, draft: Draft, rows: Rows, *before: int) -> Reading[None]:
    """Draft from the rows of the masked places; `before`: tokens that become final in this step and precede the canvas."""
    threshold = g.settings.threshold or 0.0
    if threshold == 0.0:
        g.canvas, draft.q = yield from draft_tokens(rows, g, *before)
    elif g.constraint is not None:
        first = g.canvas.index(g.traits.mask_token_id)
        lead, _, _ = yield from fill_from_left(rows, g, [*g.final, *before, *g.canvas[:first]], threshold)
        g.canvas[first : first + len(lead)] = lead
    else:
        (taken,) = yield [_sure_drafts(g, rows, before)]
        _take(g, taken)


def _sure_drafts(g: Generation, rows: Rows, before: Sequence[int], counts: Tensor | None = None) -> Tensor:
    """Of each masked place the likeliest token, and whether it is sure enough to be taken now, unread. counts: of tokens before the
    place that only the device knows."""
    # Several passes. Which places commit depends on the tokens drawn, so no q describes them: draft greedily and let the
    # verification treat each draft as certain, which is exact whatever the drafts are.
    history = [*g.final, *before, *(token for token in g.canvas if token != g.traits.mask_token_id)]
    best, confidence = likeliest(rows, g, history, counts)
    candidates = Candidates(
        confidence=confidence,
        scores=lambda: adjusted(rows.logits, g, history, counts),
        quota=1,
        threshold=g.settings.threshold or 0.0,
        entropy_bound=0.0,
        random=g.random,
    )
    return torch.stack((best, POLICIES["threshold"](candidates)), dim=1)


def _take(g: Generation, taken: list[list[int]]) -> None:
    """Put those on the canvas."""
    places = [i for i, token in enumerate(g.canvas) if token == g.traits.mask_token_id]
    for place, (token, take) in zip(places, taken, strict=True):
        if take:
            g.canvas[place] = token


class QuadraticSelfSpeculation(OneByOne):
    """Verify a draft and pre-draft the next in one forward. The adapter may act on masks only: the rest must stay causal and clean."""

    def plan_one(self, g: Generation) -> Step:
        length = length_of_block(g)
        known = g.uncached
        mask = g.traits.mask_token_id
        if length == 1 or g.num_left == 1 or len(known) > LONGEST_MIXED_PREFILL:
            g.canvas, g.state = [], None
            return causal_step(g, "speculate")
        if g.state is None:
            # prefill: the known tokens, causal, and one group of masks behind them
            num_known, num_groups = len(known), 1
            view = BlockOverCausal(num_known)
            after: tuple[int, ...] = (num_known - 1,)
        else:
            known = known + tuple(g.canvas)
            num_known = num_groups = len(known)
            view = VerifyAndPredraft(num_known, _masks_per_group(g))
            after = tuple(range(num_known))
        tokens = known + (mask,) * (num_groups * _masks_per_group(g))
        masks = tuple(range(num_known, len(tokens)))
        at: tuple[int, ...] = ()
        if g.traits.first_is_exact:
            after += masks
        else:
            # the first mask of a group stands where the causal row already predicts, so nobody asks for it
            at = tuple(i for i in masks if (i - num_known) % length)
        return Step(
            kind="prefill" if g.cached < len(g.prompt) else "speculate",
            tokens=tokens,
            view=view,
            after=after,
            at=at,
            adapted=() if g.traits.adapter_on_draft == "none" else masks,
        )

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        num_known = step.view.num_causal(len(step.tokens))
        if num_known == len(step.tokens):
            return (yield from one_token(g, predictions.after, num_known))
        num_verified = 1 if g.state is None else num_known
        drafts = predictions.after[num_verified:] if g.traits.first_is_exact else predictions.at
        verified = predictions.after[:num_verified]
        if g.state is None:
            found = yield from verify_and_draft([], None, verified, drafts, g)
            outcome = Outcome(committed=tuple(found.committed), kept=num_known, logprobs=found.logprobs)
        else:
            found = yield from verify_and_draft(g.canvas, g.state.q, verified, drafts, g)
            outcome = _verified(found.committed, found.logprobs)
        g.canvas, g.state = found.drafts, Draft(q=found.q)
        return outcome

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        length = settings.block_length or traits.block_length
        return length * (length + 1)


def _masks_per_group(g: Generation) -> int:
    """Masks that give the `length - 1` drafts behind a token that is not known yet."""
    return length_of_block(g) - 1 if g.traits.first_is_exact else length_of_block(g)
