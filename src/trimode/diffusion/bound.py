"""The diffusion bound on a block's log-likelihood: which places to mask, with what weight, and what a sample of them is worth.

    -log p(x) <= E_t [1/t sum of masked -log p(x_i | x_t)]            t uniform in (0, 1], each place masked with probability t
              =  sum over k = 1..n of 1/k E_S [sum over S of -log p(x_i | x without S)]     S uniform among sets of k places

The second line integrates t out: it is the average over all orders in which the places could be revealed one at a time. Sampling it
count by count leaves only the choice of places to chance, and where all sets of k places are few they are simply all taken.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trimode.diffusion.corruption import SMALLEST_RATIO
from trimode.errors import SettingError

__all__ = ["Estimate", "MaskDraw", "combine", "draw_by_count", "draw_by_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDraw:
    """One set of masked places of a block."""

    masked: tuple[int, ...]
    """In order; may be empty."""
    weight: float
    """Times the summed -log p of the masked places it is an unbiased draw of its stratum."""
    stratum: int
    """Draws of one stratum are averaged, strata are added."""
    is_exhaustive: bool = False
    """The stratum holds every set that it could: no chance is left in it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was partly measured by chance. Estimates of independent parts add."""

    value: float
    variance: float = 0.0

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value + other.value, self.variance + other.variance)


def draw_by_count(num_places: int, samples: int | None, generator: torch.Generator) -> list[MaskDraw]:
    """Every number of masks from 1 to all; `samples` sets for each, or all of them where there are no more. None: always all.

    Raises SettingError for fewer than two samples: one would say nothing of its own error.
    """
    _check(samples)
    draws = []
    for k in range(1, num_places + 1):
        if samples is None or math.comb(num_places, k) <= samples:
            sets = list(itertools.combinations(range(num_places), k))
            draws += [MaskDraw(masked=s, weight=1 / k, stratum=k, is_exhaustive=True) for s in sets]
            continue
        for _ in range(samples):
            places = torch.randperm(num_places, generator=generator)[:k].tolist()
            draws.append(MaskDraw(masked=tuple(sorted(places)), weight=1 / k, stratum=k))
    return draws


def draw_by_time(num_places: int, samples: int, generator: torch.Generator) -> list[MaskDraw]:
    """The textbook's draws: a ratio t, each place masked with probability t, weight 1/t. For comparison: the same mean, more noise.

    t is at least 0.001, as in training, so that the weights have a variance.
    """
    _check(samples)
    draws = []
    for _ in range(samples):
        t = max(float(torch.rand((), generator=generator, dtype=torch.float64)), SMALLEST_RATIO)
        hit = torch.rand(num_places, generator=generator, dtype=torch.float64) < t
        draws.append(MaskDraw(masked=tuple(hit.nonzero()[:, 0].tolist()), weight=1 / t, stratum=0))
    return draws


def combine(draws: Sequence[MaskDraw], losses: Mapping[tuple[int, ...], float]) -> Estimate:
    """The bound on -log p in nats. losses: the summed -log p of the masked places, by set; an empty set costs nothing."""
    strata: dict[int, list[float]] = {}
    exhaustive = {d.stratum for d in draws if d.is_exhaustive}
    for d in draws:
        strata.setdefault(d.stratum, []).append(d.weight * losses[d.masked] if d.masked else 0.0)
    total = Estimate(0.0)
    for stratum, values in strata.items():
        mean = math.fsum(values) / len(values)
        variance = 0.0
        if stratum not in exhaustive:
            variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)
        total = total + Estimate(mean, variance)
    return total


def _check(samples: int | None) -> None:
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 2):
        raise SettingError(f"samples must be at least 2, so that they tell their own error; got {samples!r}.")
