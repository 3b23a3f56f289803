"""What runs a forward: one contract, two engines.

`TorchForward` (here) runs every family, dtype and device, and is the oracle; `model.native.NativeForward` runs on the CPU in C++. Each
makes and owns its cache's memory. Whoever plans forwards cannot tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimode.model.attention import CachedAttention, KernelName, Span
from trimode.model.cache import KeyValueCache
from trimode.model.config import ModelConfig
from trimode.model.lora import Lora
from trimode.model.transformer import Transformer

__all__ = ["Answers", "Cache", "Forward", "Inputs", "Scores", "TorchForward"]


class Answers(NamedTuple):
    """The output head over some hidden states, and what was found beside."""

    logits: Tensor
    """[n, V] in the model's dtype"""
    best: tuple[int, ...] | None = None
    """The arg-max of each row, the mask token left out; None where nobody looked."""
    logsumexp: Tensor | None = None
    """[n] float32; None where nobody looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All rows of a forward, packed behind one another."""

    tokens: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    """Which inputs are one row's, and where in the cache they go."""
    adapted: Sequence[int] = ()
    """Inputs that the adapter acts on."""
    asked: Sequence[int] = ()
    """Inputs whose logits are wanted, in this order."""


@runtime_checkable
class Cache(Protocol):
    """Keys and values in slots, each of its own length. See `KeyValueCache`."""

    starts: list[int]
    lengths: list[int]

    def place(self, slot: int, start: int, length: int) -> None: ...
    def copy(self, source: int, target: int, num_positions: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...


@runtime_checkable
class Scores(Protocol):
    """What a forward found about the inputs that were asked for."""

    def answers(self, start: int, stop: int) -> "Answers":
        """Of these of them. Valid until the next forward."""
        ...

    def logits(self, start: int, stop: int) -> Tensor:
        """The logits alone."""
        ...


@runtime_checkable
class Forward(Protocol):
    """Runs forwards of one model."""

    config: ModelConfig
    dtype: torch.dtype
    """Of the logits."""
    device: torch.device
    precision: str
    """What the weights are held in."""

    def make_cache(self, lengths: Sequence[int]) -> Cache:
        """Room for one generation a slot."""
        ...

    def describe(self) -> str:
        """What runs, in a few words: whatever a forward's cost hangs on beside the model and the machine."""
        ...

    def __call__(self, inputs: Inputs, cache: Cache) -> Scores:
        """One forward: keys and values go into the cache, behind each row's cursor."""
        ...


class TorchForward:
    """A `Transformer` over a `KeyValueCache`."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        lora: Lora | None = None,
        kernel: KernelName = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transformer = transformer
        self.config = transformer.config
        self._lora = lora
        self._kernel: KernelName = kernel
        self.dtype = dtype
        self.device = torch.device(device)
        self.precision = str(dtype).removeprefix("torch.")

    def make_cache(self, lengths: Sequence[int]) -> KeyValueCache:
        return KeyValueCache(self.config, lengths, dtype=self.dtype, device=self.device)

    def describe(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"torch {self.precision}, {self._kernel}{threads}"

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, cache: Cache) -> "TorchScores":
        assert isinstance(cache, KeyValueCache)
        device = self.device
        hidden = self.transformer(
            torch.tensor(inputs.tokens, device=device),
            torch.tensor(inputs.positions, device=device),
            CachedAttention(inputs.spans, cache, self._kernel, device),
            lora=self._lora,
            lora_rows=None if self._lora is None else torch.tensor(inputs.adapted, dtype=torch.long, device=device),
        )
        asked = torch.tensor(inputs.asked, dtype=torch.long, device=device)
        return TorchScores(self.transformer, hidden[asked])


class TorchScores:
    """Hidden states, and the head that turns them into logits."""

    def __init__(self, transformer: Transformer, hidden: Tensor) -> None:
        self._transformer = transformer
        self._hidden = hidden

    def answers(self, start: int, stop: int) -> Answers:
        return Answers(self.logits(start, stop))

    @torch.inference_mode()
    def logits(self, start: int, stop: int) -> Tensor:
        return self._transformer.logits(self._hidden[start:stop])
