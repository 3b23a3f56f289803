"""Keys and values of what is final, in memory that is allocated once.

A forward writes its keys after a row's cursor; whether they stay is decided later, by moving the cursor. A rejected draft is simply
overwritten by the next step: nothing is copied, cropped or rolled back.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from trimode.model.config import ModelConfig

__all__ = ["KeyValueCache", "Memory"]


class Memory:
    """Keys and values [positions, G, K] of each layer. It outlives a cache where graphs were captured that hold its addresses."""

    def __init__(
        self,
        config: ModelConfig,
        num_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        spare: int = 0,
    ) -> None:
        """spare: positions behind all slots; two of them are `blank` and `scratch`."""
        self.num_positions = num_positions
        self._has_spare = spare >= 2
        shape = (num_positions + spare, config.num_kv_heads, config.head_size)
        # zeros, not empty: rows of one batch attend over the longest of them, and masked garbage could be NaN, which survives a
        # zero weight
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    @property
    def blank(self) -> int:
        """A position that is always zero."""
        assert self._has_spare
        return self.num_positions

    @property
    def scratch(self) -> int:
        """A position that nobody reads: padding writes there."""
        assert self._has_spare
        return self.num_positions + 1

    def clear(self) -> None:
        """Let all be as in new memory."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()


class KeyValueCache:
    """Room for one generation a slot, each slot of its own length, one behind the other."""

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory: Memory | None = None,
    ) -> None:
        """memory: where it lies; None: in memory of its own."""
        self.lengths = list(lengths)
        """Positions of each slot."""
        ends = list(accumulate(self.lengths))
        self.starts = [0, *ends[:-1]]
        """Where each slot begins among the positions of all."""
        self.memory = memory or Memory(config, ends[-1], dtype=dtype, device=device)
        self._keys, self._values = self.memory.keys, self.memory.values

    def write(self, layer: int, flat_positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [N, G, K] at positions counted over all slots (starts[slot] + position)."""
        self._keys[layer].index_copy_(0, flat_positions, keys)
        self._values[layer].index_copy_(0, flat_positions, values)

    def read(self, layer: int, start: int, spacing: int, num_rows: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows that begin `spacing` positions apart, as views [num_rows, G, num_positions, K]."""
        keys, values = self._keys[layer], self._values[layer]
        _, G, K = keys.shape
        size = (num_rows, G, num_positions, K)
        stride = (spacing * G * K, K, G * K, 1)
        offset = start * G * K
        return keys.as_strided(size, stride, offset), values.as_strided(size, stride, offset)

    def place(self, slot: int, start: int, length: int) -> None:
        """Let a slot be these positions from now on; whoever places slots keeps them apart."""
        self.starts[slot], self.lengths[slot] = start, length

    def copy(self, source: int, target: int, num_positions: int) -> None:
        """Copy what lies at `source` and behind it to `target`; the two may overlap."""
        for tensor in (*self._keys, *self._values):
            kept = tensor[source : source + num_positions]
            tensor[target : target + num_positions] = kept.clone() if abs(source - target) < num_positions else kept

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))
