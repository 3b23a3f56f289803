"""Low-rank adapters that act on some rows of a forward and leave the others bit for bit alone.

`y[rows] += scale * B(A(x[rows]))`. Nothing is switched on an object: which rows an adapter acts on is an argument of the forward.
The two small products run in the adapter's own dtype (float32 as stored, like PEFT) and are added before rounding to the
activations' dtype. arXiv 2106.09685.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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

    def delta(self, layer: int, part: str, x: Tensor) -> Tensor | None:
        """What the adapter adds to this part's output for inputs x: [N, inputs]; None if it leaves the part alone."""
        pair = self.factors.get((layer, part))
        if pair is None:
            return None
        A, B = pair
        return (x.to(A.dtype) @ A.T) @ B.T * self.scale

    @property
    def parts(self) -> frozenset[str]:
        """The parts that it acts on, in any layer."""
        return frozenset(part for _, part in self.factors)

    def tensors(self) -> Iterable[Tensor]:
        """Every factor."""
        for A, B in self.factors.values():
            yield A
            yield B
