"""Keys and values of what is final, in memory that is allocated once.

A forward writes its keys after a row's cursor; whether they stay is decided later, by moving the cursor. A rejected draft is simply
overwritten by the next step: nothing is copied, cropped or rolled back.
"""

import torch
from torch import Tensor

from trimode.model.config import ModelConfig

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """Room for `num_slots` generations of `capacity` positions each."""

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_slots, capacity, config.num_kv_heads, config.head_size)
        # zeros, not empty: a batch attends over the longest row, and masked garbage could be NaN, which survives a zero weight
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._flat_keys = [t.flatten(0, 1) for t in self.keys]
        self._flat_values = [t.flatten(0, 1) for t in self.values]
        self.num_slots = num_slots
        self.capacity = capacity

    def write(self, layer: int, flat_positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [N, G, K] at positions counted over all slots (slot * capacity + position)."""
        self._flat_keys[layer].index_copy_(0, flat_positions, keys)
        self._flat_values[layer].index_copy_(0, flat_positions, values)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))
