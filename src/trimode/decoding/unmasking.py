"""Which masked positions of a block commit in a step: policies as functions of what the model thinks of each position.

Ties go to the leftmost position, which the reference leaves to the sort's mood.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimode.decoding.interface import sent

__all__ = ["POLICIES", "Candidates", "Policy", "quota"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The masked positions of one block, left to right, and the best guess for each."""

    confidence: Float[Tensor, " M"]
    """Probability of the chosen token under the untempered distribution, in the model's dtype as the reference has it."""
    scores: Callable[[], Float[Tensor, "M V"]]
    """Logits in float32, made when a policy looks at them; most do not."""
    quota: int
    """How many positions an even schedule commits in this step."""
    threshold: float
    """Confidence from which a position commits."""
    entropy_bound: float
    """Nats that jointly committed positions may hold."""
    random: torch.Generator

    @property
    def probabilities(self) -> Float[Tensor, "M V"]:
        """Of every token."""
        return self.scores().softmax(dim=-1)

    @property
    def margin(self) -> Float[Tensor, " M"]:
        """Lead of the best probability over the second."""
        best = self.probabilities.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    @property
    def entropy(self) -> Float[Tensor, " M"]:
        """Nats."""
        return torch.special.entr(self.probabilities).sum(dim=-1)


Policy = Callable[[Candidates], Bool[Tensor, " M"]]


def _best(score: Tensor, count: int) -> Tensor:
    """True at the `count` highest scores."""
    best = score.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, best, True)


def _at_least(score: Tensor, bound: float) -> Tensor:
    # in the score's own dtype: the reference compares bfloat16 with bfloat16(0.9), which is 0.8984
    return (score >= torch.full((), bound, dtype=score.dtype, device=score.device)) | _best(score, 1)


def threshold(c: Candidates) -> Tensor:
    """All that are confident enough, and always the most confident one."""
    return _at_least(c.confidence, c.threshold)


def fixed(c: Candidates) -> Tensor:
    """The step's quota, the most confident first."""
    return _best(c.confidence, c.quota)


def entropy_bound(c: Candidates) -> Tensor:
    """The most certain ones while the entropy that they hold together, less the largest, stays within the bound (arXiv 2505.24857)."""
    ordered, order = c.entropy.sort(stable=True)
    within = ordered.cumsum(dim=0) - ordered <= c.entropy_bound
    return torch.zeros_like(within).scatter(0, order, within)


def margin(c: Candidates) -> Tensor:
    """All whose best token leads clearly, and always the clearest one."""
    return _at_least(c.margin, c.threshold)


def leftmost(c: Candidates) -> Tensor:
    """From the left, up to the first that is not confident enough; always the leftmost one."""
    sure = c.confidence >= torch.full((), c.threshold, dtype=c.confidence.dtype, device=c.confidence.device)
    sure[0] = True
    return sure.int().cumprod(dim=0).bool()


def random(c: Candidates) -> Tensor:
    """The step's quota, anywhere."""
    noise = torch.rand(len(c.confidence), generator=c.random, dtype=torch.float64)
    return _best(sent(noise, c.confidence.device), c.quota)


POLICIES: dict[str, Policy] = {
    "threshold": threshold,
    "fixed": fixed,
    "entropy_bound": entropy_bound,
    "margin": margin,
    "leftmost": leftmost,
    "random": random,
}


def quota(num_masked: int, num_steps: int, step: int) -> int:
    """Positions that an even split of `num_masked` over `num_steps` gives to this step; early steps take the remainder."""
    base, extra = divmod(num_masked, num_steps)
    return base + (step < extra)
