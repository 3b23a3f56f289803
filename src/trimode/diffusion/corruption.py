"""Noise: which tokens of a text are masked, which are replaced, drawn from the sample's own random numbers.

The numbers depend on the run's seed and the sample's global index alone, so a sample meets the same noise on any number of ranks, in
any split into batches, and after a resume.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["SMALLEST_RATIO", "SampleNoise", "mask_uniformly", "plant_errors"]

SMALLEST_RATIO = 1e-3
"""Mask ratios lie between this and 1, so that the weight 1/p stays bounded (the reference's epsilon)."""


@dataclass(frozen=True, slots=True)
class SampleNoise:
    """Random numbers by sample."""

    seed: int

    def of(self, sample: int) -> torch.Generator:
        """This sample's generator, always from its beginning."""
        return self.of_text(str(sample))

    def of_text(self, text: str) -> torch.Generator:
        """A generator for something else that has a name."""
        digest = hashlib.blake2b(f"{self.seed}/{text}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def mask_uniformly(may_mask: Bool[Tensor, " T"], generator: torch.Generator) -> tuple[Bool[Tensor, " T"], float]:
    """One ratio p for the whole text, uniform in (0, 1]; each token that may be masked is, with probability p. Returns both."""
    t = float(torch.rand((), generator=generator, dtype=torch.float64))
    p = (1 - SMALLEST_RATIO) * t + SMALLEST_RATIO
    drawn = torch.rand(len(may_mask), generator=generator, dtype=torch.float64) < p
    return may_mask & drawn.to(may_mask.device), p


def plant_errors(
    tokens: Int[Tensor, " T"],
    may_change: Bool[Tensor, " T"],
    ratio: float,
    vocab_size: int,
    avoid: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, " T"], Bool[Tensor, " T"]]:
    """Replace each token that may change, with probability `ratio`, by a uniformly drawn other one (never `avoid`)."""
    hit = (torch.rand(len(tokens), generator=generator, dtype=torch.float64) < ratio) & may_change.cpu()
    drawn = torch.randint(0, vocab_size, (len(tokens),), generator=generator)
    # two tokens are excluded, so the draw goes on to the next free one
    for _ in range(2):
        drawn = torch.where((drawn == tokens.cpu()) | (drawn == avoid), (drawn + 1) % vocab_size, drawn)
    return torch.where(hit, drawn, tokens.cpu()).to(tokens.device), hit.to(tokens.device)
