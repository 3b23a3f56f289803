"""Low-rank adapters that act on some rows of a forward and leave the others bit for bit alone.

`y[rows] += scale * B(A(x[rows]))`. Nothing is switched on an object: which rows an adapter acts on is an argument of the forward.
The two small products run in the wider of the adapter's and the activations' dtype (float32 as stored, like PEFT) and are added
before rounding to the activations' dtype. arXiv 2106.09685.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.model.linear import as_map
from trimode.model.successor import Successor

__all__ = ["ADAPTED_PARTS", "Lora"]

ADAPTED_PARTS = ("query", "key", "value", "output", "gate", "up", "down")
"""The linear maps of a layer that an adapter may act on, by trimode's names."""

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter: its factors by `(layer index, part)`."""

    factors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    """A: [rank, inputs] and B: [outputs, rank]."""
    scale: float
    """alpha / rank."""
    mask_embedding: Tensor | None = None
    """[D]: what the inputs that it acts on are embedded as, in place of the mask token's own row; None: that row."""
    successor: Successor | None = None
    """What lets drafts know the draft before them."""

    _ready: dict[tuple[int, tuple[str, ...], torch.dtype], tuple[Tensor, list[Tensor | None]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Factors as products want them, made when first used."""
    _maps: dict[tuple[int, tuple[str, ...], torch.dtype], tuple[_Map, list[_Map | None]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The same as maps, for inference."""

    def add(
        self, layer: int, parts: Sequence[str], x: Tensor, ys: Sequence[Tensor], acts: Tensor | None = None
    ) -> list[Tensor]:
        """These parts' outputs ys [N, outputs] for inputs x [N, inputs], each with what the adapter adds, in its own dtype; only on
        the rows where `acts` [N, 1] is true (None: on all)."""
        parts = tuple(parts)
        A, Bs = self._prepared(layer, parts, x.dtype)
        key = (layer, parts, x.dtype)
        if key not in self._maps:
            self._maps[key] = as_map(A), [None if B is None else as_map(B) for B in Bs]
        down, ups = self._maps[key]
        lows = down(x.to(A.dtype))
        if acts is not None:
            lows = lows * acts
        low = iter(lows.split([B.shape[1] for B in Bs if B is not None], dim=-1))
        if x.is_cuda and x.dtype == A.dtype:
            # one kernel for product, scale and sum
            return [
                y if B is None else torch.addmm(y, next(low), B.T, alpha=self.scale)
                for y, B in zip(ys, Bs, strict=True)
            ]
        return [y if up is None else _plus(y, up(next(low)), self.scale) for y, up in zip(ys, ups, strict=True)]

    @property
    def is_trained(self) -> bool:
        """Whether gradients are to reach the factors."""
        return torch.is_grad_enabled() and next(A for A, _ in self.factors.values()).requires_grad

    def product(
        self, layer: int, parts: Sequence[str], x: Tensor, weight: Tensor, bias: Tensor | None, acts: Tensor | None
    ) -> Tensor:
        """x weight' + bias with what the adapter adds on the rows where `acts` [N, 1] is one (None: all). For training: gradients go
        to x and to the factors, none to the weight, and no output is copied as in `add`."""
        A, Bs = self._prepared(layer, tuple(parts), x.dtype)
        y = _AdaptedProduct.apply(x, weight, bias, acts, self.scale, A, *Bs)
        assert isinstance(y, Tensor)
        return y

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
        if self.successor is not None:
            yield self.successor.inner
            yield self.successor.outer

    def to(self, target: torch.device | torch.dtype) -> "Lora":
        """The same adapter on another device, or rounded to another dtype."""
        return self.each(lambda tensor: tensor.to(target))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Lora":
        """The same adapter with every tensor changed."""
        successor = self.successor
        return replace(
            self,
            factors={place: (change(A), change(B)) for place, (A, B) in self.factors.items()},
            mask_embedding=None if self.mask_embedding is None else change(self.mask_embedding),
            successor=None if successor is None else Successor(change(successor.inner), change(successor.outer)),
        )


class _AdaptedProduct(torch.autograd.Function):
    """The linear maps of `parts` lie under one another in `weight`, in equal order; Bs holds None where one of them has no adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        acts: Tensor | None,
        scale: float,
        A: Tensor,
        *Bs: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        low = x @ A.T
        if acts is not None:
            low *= acts
        for own, inner, B in _corners(Bs):
            y[:, own].addmm_(low[:, inner], B.T, alpha=scale)
        ctx.save_for_backward(x, weight, acts, A, low, *Bs)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight, acts, A, low, *Bs = ctx.saved_tensors
        grad_low = torch.empty_like(low)
        grad_Bs = []
        for own, inner, B in _corners(Bs):
            torch.mm(grad[:, own], B, out=grad_low[:, inner])
            grad_Bs.append(torch.mm(grad[:, own].T, low[:, inner]).mul_(ctx.scale))
        grad_low *= ctx.scale if acts is None else acts * ctx.scale
        grad_x = torch.addmm(grad @ weight, grad_low, A) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, grad_low.T @ x, *grad_Bs


def _corners(Bs: Sequence[Tensor]) -> Iterable[tuple[slice, slice, Tensor]]:
    """Each B with the outputs that are its own and the columns of the low product that feed it."""
    row = column = 0
    for B in Bs:
        num_outputs, rank = B.shape
        yield slice(row, row + num_outputs), slice(column, column + rank), B
        row, column = row + num_outputs, column + rank


def _plus(y: Tensor, added: Tensor, scale: float) -> Tensor:
    return torch.add(y, added, alpha=scale).to(y.dtype)
