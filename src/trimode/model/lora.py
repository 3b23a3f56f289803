"""Low-rank adapters that act on some rows of a forward and leave the others bit for bit alone.

`y[rows] += scale * B(A(x[rows]))`. Nothing is switched on an object: which rows an adapter acts on is an argument of the forward.
The two small products run in the adapter's own dtype (float32 as stored, like PEFT) and are added before rounding to the
activations' dtype. arXiv 2106.09685.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["ADAPTED_PARTS", "Lora"]

ADAPTED_PARTS = ("query", "key", "value", "output", "gate", "up", "down")
"""The linear maps of a layer that an adapter may act on, by trimode's names."""


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter: its factors by `(layer index, part)`."""

    factors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    """A: [rank, inputs] and B: [outputs, rank]."""
    scale: float
    """alpha / rank."""
    mask_embedding: Tensor | None = None
    """[D]: what the inputs that it acts on are embedded as, in place of the mask token's own row; None: that row."""

    def add(self, layer: int, parts: Sequence[str], x: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        """These parts' outputs ys [N, outputs] for inputs x [N, inputs], each with what the adapter adds, in its own dtype."""
        pairs = [self.factors.get((layer, part)) for part in parts]
        present = [pair for pair in pairs if pair is not None]
        # the parts share their inputs: one product with all of their A, one under the other
        together = present[0][0] if len(present) == 1 else torch.cat([A for A, _ in present])
        low = iter((x.to(together.dtype) @ together.T).split([len(A) for A, _ in present], dim=-1))
        return [
            y if pair is None else _plus(y, next(low), pair[1], self.scale) for y, pair in zip(ys, pairs, strict=True)
        ]

    @property
    def parts(self) -> frozenset[str]:
        """The parts that it acts on, in any layer."""
        return frozenset(part for _, part in self.factors)

    def tensors(self) -> Iterable[Tensor]:
        """Every factor."""
        for A, B in self.factors.values():
            yield A
            yield B
        if self.mask_embedding is not None:
            yield self.mask_embedding

    def to(self, device: torch.device) -> "Lora":
        """The same adapter on another device."""
        factors = {place: (A.to(device), B.to(device)) for place, (A, B) in self.factors.items()}
        return replace(
            self,
            factors=factors,
            mask_embedding=None if self.mask_embedding is None else self.mask_embedding.to(device),
        )


def _plus(y: Tensor, low: Tensor, B: Tensor, scale: float) -> Tensor:
    if y.dtype == low.dtype:
        return torch.addmm(y, low, B.T, alpha=scale)
    return (y + low @ B.T * scale).to(y.dtype)
