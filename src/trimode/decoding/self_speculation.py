"""`self_spec`: the block view drafts, the causal view of the same weights verifies; the text is exactly the autoregressive one.

Linear (arXiv 2607.05722, section 3): one forward drafts a block behind the last final token, one forward checks it; 2 forwards a
round. Quadratic (appendix C; 2511.08923): one forward checks a draft and at the same time drafts the next block for every way the
check may end; 1 forward a round, B * (B + 1) inputs wide.
"""

from dataclasses import dataclass

from torch import Tensor

from trimode.decoding.autoregressive import causal_step
from trimode.decoding.block_diffusion import block_step, length_of_block
from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Step, Traits
from trimode.decoding.sampling import adjusted, draft_tokens, next_token, verify
from trimode.decoding.settings import Settings
from trimode.decoding.unmasking import POLICIES, Candidates
from trimode.model.views import BlockOverCausal, Causal, VerifyAndPredraft

__all__ = ["LinearSelfSpeculation", "QuadraticSelfSpeculation"]

LONGEST_MIXED_PREFILL = 512
"""A longer prompt is read by a causal step of its own: one forward more, but no square of its length as a mask in memory."""


@dataclass(slots=True)
class Draft:
    """A drafted block behind the last final token; its tokens are the generation's canvas."""

    q: Tensor | None = None
    """Distributions that the tokens were drawn from [T, V]; None: greedy, or drafted in several passes."""


class LinearSelfSpeculation(OneByOne):
    """Draft, verify, draft, verify."""

    def plan_one(self, g: Generation) -> Step:
        mask = g.traits.mask_token_id
        if len(g.uncached) != 1 or g.cached < len(g.prompt):
            return causal_step(g, "verify")
        if g.state is None:
            # one token is left, or the block has room for the anchor only: a draft would save nothing
            if g.num_left == 1 or length_of_block(g) == 1:
                return causal_step(g, "verify")
            g.canvas = [mask] * (length_of_block(g) - 1)
            g.state = Draft()
        places = [i for i, token in enumerate(g.canvas) if token == mask]
        if places:
            return block_step(g, "draft", g.canvas, places, g.traits.adapter_on_draft)
        tokens = g.uncached + tuple(g.canvas)
        return Step(kind="verify", tokens=tokens, view=Causal(), after=tuple(range(len(tokens))))

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Outcome:
        if step.kind == "draft":
            _fill_draft(g, g.state, predictions.at)
            return Outcome()
        if g.state is None:
            return Outcome(committed=(next_token(predictions.after, g),), kept=len(step.tokens))
        draft: Draft = g.state
        committed = verify(g.canvas, draft.q, predictions.after, g)
        g.canvas, g.state = [], None
        # the bonus token is final but not cached: it leads the next draft
        return Outcome(committed=tuple(committed), kept=len(committed), accepted=len(committed) - 1)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length


def _fill_draft(g: Generation, draft: Draft, logits: Tensor) -> None:
    mask = g.traits.mask_token_id
    places = [i for i, token in enumerate(g.canvas) if token == mask]
    threshold = g.settings.threshold or 0.0
    if threshold == 0.0:
        tokens, draft.q = draft_tokens(logits, g)
        g.canvas = tokens
        return
    # Several passes. Which places commit depends on the tokens drawn, so no q describes them: draft greedily and let the
    # verification treat each draft as certain, which is exact whatever the drafts are.
    known = [token for token in g.canvas if token != mask]
    scores = adjusted(logits, g, [*g.final, *known])
    best = scores.argmax(dim=-1)
    probabilities = logits.float().softmax(dim=-1)
    candidates = Candidates(
        confidence=probabilities.gather(-1, best[:, None])[:, 0].to(logits.dtype),
        probabilities=scores.softmax(dim=-1),
        quota=1,
        threshold=threshold,
        entropy_bound=0.0,
        random=g.random,
    )
    for place, token, take in zip(places, best.tolist(), POLICIES["threshold"](candidates).tolist(), strict=True):
        if take:
            g.canvas[place] = token


class QuadraticSelfSpeculation(OneByOne):
    """Verify a draft and pre-draft the next in one forward. The adapter may act on masks only: the rest must stay causal and clean."""

    def plan_one(self, g: Generation) -> Step:
        length = length_of_block(g)
        known = g.uncached
        mask = g.traits.mask_token_id
        adapter = g.traits.adapter_on_draft
        if length == 1 or g.num_left == 1 or len(known) > LONGEST_MIXED_PREFILL:
            g.canvas, g.state = [], None
            return causal_step(g, "speculate")
        if g.state is None:
            # prefill: the known tokens, causal, and one block of masks behind them
            num_known = len(known)
            tokens = known + (mask,) * length
            masks = range(num_known, len(tokens))
            kind = "prefill" if g.cached < len(g.prompt) else "speculate"
            return Step(
                kind=kind,
                tokens=tokens,
                view=BlockOverCausal(num_known),
                after=(num_known - 1,),
                at=tuple(masks[1:]),
                adapted=() if adapter == "none" else tuple(masks),
            )
        known = known + tuple(g.canvas)
        num_known = len(known)
        tokens = known + (mask,) * (num_known * length)
        masks = range(num_known, len(tokens))
        # the first mask of a group stands where the causal row already predicts, so nobody asks for it
        asked = tuple(i for i in masks if (i - num_known) % length)
        return Step(
            kind="speculate",
            tokens=tokens,
            view=VerifyAndPredraft(num_known, length),
            after=tuple(range(num_known)),
            at=asked,
            adapted=() if adapter == "none" else tuple(masks),
        )

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Outcome:
        if not step.at:
            return Outcome(committed=(next_token(predictions.after, g),), kept=len(step.tokens))
        if g.state is None:
            num_known = step.view.num_causal(len(step.tokens))
            anchor = next_token(predictions.after, g)
            self._set_draft(g, predictions.at)
            return Outcome(committed=(anchor,), kept=num_known)
        draft: Draft = g.state
        committed = verify(g.canvas, draft.q, predictions.after, g)
        num_accepted = len(committed) - 1
        per_group = length_of_block(g) - 1
        self._set_draft(g, predictions.at[num_accepted * per_group : (num_accepted + 1) * per_group])
        return Outcome(committed=tuple(committed), kept=len(committed), accepted=num_accepted)

    def _set_draft(self, g: Generation, logits: Tensor) -> None:
        tokens, q = draft_tokens(logits, g)
        g.canvas, g.state = tokens, Draft(q=q)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        length = settings.block_length or traits.block_length
        return length * (length + 1)
