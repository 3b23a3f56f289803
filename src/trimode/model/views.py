"""Who sees whom in one forward pass.

A view is a value: it says, for two inputs of the same step, whether the first one (the query) sees the second (the key). Every
input also sees the whole cached prefix; that is the cache's business, not the view's. Because a view is an argument of a forward
and never a mode of the model, steps with different views share a batch and nothing leaks from one request to the next.

The one idea worth knowing: only keys of inputs that see causally may stay in the cache. `num_causal` counts them; they always
come first.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Bidirectional",
    "BlockCausal",
    "BlockOverCausal",
    "Causal",
    "NoisyAndClean",
    "VerifyAndPredraft",
    "View",
    "visible_matrix",
]


@runtime_checkable
class View(Protocol):
    """Visibility among the T inputs of one step."""

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether input q sees input k, for broadcastable index tensors. Arithmetic only, so that FlexAttention can trace it."""
        ...

    def num_causal(self, length: int) -> int:
        """How many leading inputs see nothing but themselves and earlier inputs: the keys that may stay."""
        ...

    def offsets(self, length: int) -> list[int]:
        """Each input's position, counted from the first input's."""
        ...

    def predecessor(self, index: int) -> int:
        """The input one position before this one, as this one sees the text."""
        ...


class _Consecutive:
    """Positions that count up by one, as in every view but the repeated ones."""

    __slots__ = ()

    def offsets(self, length: int) -> list[int]:
        return list(range(length))

    def predecessor(self, index: int) -> int:
        return index - 1


@dataclass(frozen=True, slots=True)
class Causal(_Consecutive):
    """Each input sees itself and the earlier ones: autoregression, prefill, verification, committing."""

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def num_causal(self, length: int) -> int:
        return length


@dataclass(frozen=True, slots=True)
class Bidirectional(_Consecutive):
    """Every input sees every other: a diffusion block over its cached prefix."""

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) & (k >= 0)

    def num_causal(self, length: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class BlockOverCausal(_Consecutive):
    """Some causal inputs, then a block that sees them and all of itself. The causal inputs never see the block."""

    causal_length: int
    """How many inputs are causal."""

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (q >= self.causal_length)

    def num_causal(self, length: int) -> int:
        return min(self.causal_length, length)


@dataclass(frozen=True, slots=True)
class BlockCausal(_Consecutive):
    """Blocks see themselves and earlier blocks: causal at block length 1, bidirectional when one block holds all."""

    block_length: int

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        return k // self.block_length <= q // self.block_length

    def num_causal(self, length: int) -> int:
        return length if self.block_length == 1 else 0


@dataclass(frozen=True, slots=True)
class NoisyAndClean:
    """Training on [noisy | clean] halves of one text (arXiv 2607.05722, section 2.2; 2509.04185).

    Noisy inputs see their own block and strictly earlier clean blocks; clean inputs see causally and never see noise.
    """

    length: int
    """Tokens of the text, half of the inputs."""
    block_length: int

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        n = self.length
        q_block, k_block = (q % n) // self.block_length, (k % n) // self.block_length
        own_block = (q < n) & (k < n) & (q_block == k_block)
        earlier_clean = (q < n) & (k >= n) & (k_block < q_block)
        clean = (q >= n) & (k >= n) & (k <= q)
        return own_block | earlier_clean | clean

    def num_causal(self, length: int) -> int:
        return 0

    def offsets(self, length: int) -> list[int]:
        return [i % self.length for i in range(length)]

    def predecessor(self, index: int) -> int:
        return index - 1


@dataclass(frozen=True, slots=True)
class VerifyAndPredraft:
    """Quadratic self-speculation: check a draft and draft the next one for each way the check may end.

    Inputs: `num_verified` known tokens, causal among themselves; then one group of `num_masks` masks for each of them. Group g
    sees the known tokens up to and including g, and itself. The known tokens come first so that those that are accepted are a
    leading run whose keys stay.
    """

    num_verified: int
    num_masks: int

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        n = self.num_verified
        q_group = torch.where(q < n, q, (q - n) // self.num_masks)
        k_group = (k - n) // self.num_masks
        return ((k < n) & (k <= q_group)) | ((q >= n) & (k >= n) & (k_group == q_group))

    def num_causal(self, length: int) -> int:
        return min(self.num_verified, length)

    def offsets(self, length: int) -> list[int]:
        n, m = self.num_verified, self.num_masks
        return [i if i < n else (i - n) // m + 1 + (i - n) % m for i in range(length)]

    def predecessor(self, index: int) -> int:
        n, m = self.num_verified, self.num_masks
        if index >= n and (index - n) % m == 0:
            return (index - n) // m
        return index - 1


def visible_matrix(view: View, length: int, device: torch.device | str = "cpu") -> Tensor:
    """The view over `length` inputs as booleans [T, T], rows are queries."""
    index = torch.arange(length, device=device)
    return view.sees(index[:, None], index[None, :])
