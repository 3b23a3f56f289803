"""Low-rank adapters that act on some rows of a forward and leave the others bit for bit alone.

`y[rows] += scale * B(A(x[rows]))`. Nothing is switched on an object: which rows an adapter acts on is an argument of the forward.
The two small products run in the wider of the adapter's and the activations' dtype (float32 as stored, like PEFT) and are added
before rounding to the activations' dtype. arXiv 2106.09685.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

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

    _ready: dict[tuple[int, tuple[str, ...], torch.dtype], tuple[Tensor, list[Tensor | None]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Factors as products want them, made when first used."""

    def add(self, layer: int, parts: Sequence[str], x: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        """These parts' outputs ys [N, outputs] for inputs x [N, inputs], each with what the adapter adds, in its own dtype."""
        together, Bs = self._prepared(layer, tuple(parts), x.dtype)
        low = iter((x.to(together.dtype) @ together.T).split([B.shape[1] for B in Bs if B is not None], dim=-1))
        return [y if B is None else _plus(y, next(low), B, self.scale) for y, B in zip(ys, Bs, strict=True)]

    def _prepared(self, layer: int, parts: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        key = (layer, parts, dtype)
        if key not in self._ready:
            pairs = [self.factors.get((layer, part)) for part in parts]
            wide = torch.promote_types(dtype, next(pair[0].dtype for pair in pairs if pair is not None))
            # the parts share their inputs: one product with all of their A, one under the other
            As = [pair[0].to(wide) for pair in pairs if pair is not None]
            together = As[0] if len(As) == 1 else torch.cat(As)
            self._ready[key] = (together, [None if pair is None else pair[1].to(wide) for pair in pairs])
        return self._ready[key]

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
