"""What runs a forward: one contract, two engines.

`TorchForward` (here) runs every family, dtype and device, and is the oracle; `model.native.NativeForward` runs on the CPU in C++. Each
makes and owns its cache's memory. Whoever plans forwards cannot tell them apart.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimode.model.attention import CachedAttention, KernelName
from trimode.model.cache import KeyValueCache, Memory
from trimode.model.config import ModelConfig
from trimode.model.graphs import Capture, KernelChoice, StaticForward
from trimode.model.inputs import Inputs
from trimode.model.lora import Lora
from trimode.model.static import find_best
from trimode.model.successor import TorchDraftHead
from trimode.model.transformer import Transformer

__all__ = ["Answers", "Cache", "Forward", "Inputs", "Scores", "TorchForward"]

_LEAST_MEMORY = 1024
"""Positions of a memory are a multiple of it, so that the next request often finds one that is large enough."""


class Answers(NamedTuple):
    """The output head over some hidden states, and what was found beside."""

    logits: Tensor
    """[n, V] in the model's dtype"""
    best: tuple[int, ...] | None = None
    """The arg-max of each row, the mask token left out, where the host knows it."""
    logsumexp: Tensor | None = None
    """[n] where the logits lie; None where nobody looked."""
    unread_best: Tensor | None = None
    """[n] ids: the arg-maxima where the logits lie, not read yet; None where nobody looked."""
    best_logits: Tensor | None = None
    """[n] Those of `unread_best`."""
    hidden: Any = None
    """[n, D] The hidden states themselves, where a draft head may want them, as it takes them."""
    draft_head: Any = None
    """Chooses drafts one behind the other (`draft`, `drafted`, `rescored`); None where the adapter has no successor."""


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

    @property
    def draft_head(self) -> Any:
        """Chooses drafts one behind the other; None where the adapter has no successor."""
        ...

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
    """A `Transformer` over a `KeyValueCache`. With a `Capture`, steps that are not too wide run as graphs over memory that stays."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        lora: Lora | None = None,
        kernel: KernelName | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capture: Capture | None = None,
        choice: KernelChoice | None = None,
        compiled: bool = False,
        precision: str | None = None,
    ) -> None:
        """kernel: of the attention; None: PyTorch's fused one, and for captured steps what measures best (`choice`). compiled: see
        `StaticForward`. precision: what the weights are held in where that is not the dtype."""
        self.transformer = transformer
        self.config = transformer.config
        self._lora = lora
        self._kernel: KernelName = kernel or "sdpa"
        self.dtype = dtype
        self.device = torch.device(device)
        self.precision = precision or str(dtype).removeprefix("torch.")
        self.capture = capture
        self._choice = choice or KernelChoice(kernel)
        self._compiled = compiled
        # a graph takes the adapter's products in the model's dtype: on a GPU float32 ones cost more than the adapter may
        self._static_lora = None if capture is None or lora is None else lora.to(dtype)
        self._static_of: WeakKeyDictionary[KeyValueCache, StaticForward] = WeakKeyDictionary()
        self._idle: list[StaticForward] = []
        self._lock = threading.Lock()
        self.draft_head: TorchDraftHead | None = None
        if lora is not None and lora.successor is not None:
            embedding = transformer.embedding.weight
            head = embedding if self.config.tied_head else transformer.head.dense_weight()
            self.draft_head = TorchDraftHead(lora.successor, embedding, head, self.config.mask_token_id)

    def make_cache(self, lengths: Sequence[int]) -> KeyValueCache:
        if self.capture is None:
            return KeyValueCache(self.config, lengths, dtype=self.dtype, device=self.device)
        with self._lock:
            static = self._lend(sum(lengths))
            cache = KeyValueCache(self.config, lengths, dtype=self.dtype, device=self.device, memory=static.memory)
            self._static_of[cache] = static
        weakref.finalize(cache, self._idle.append, static).atexit = False
        return cache

    def _lend(self, num_positions: int) -> "StaticForward":
        """Memory that nobody uses now, with the graphs that are bound to it; new memory if none is large enough."""
        assert self.capture is not None
        fitting = [s for s in self._idle if s.memory.num_positions >= num_positions]
        static = min(fitting, key=lambda s: s.memory.num_positions, default=None)
        self._idle.clear()  # all but one are given back to the device
        if static is not None:
            static.memory.clear()
            return static
        num_rounded = max(1, -(-num_positions // _LEAST_MEMORY)) * _LEAST_MEMORY
        # whoever asks may be in inference mode, and what is made there nobody else could write to
        with torch.inference_mode(False):
            memory = Memory(self.config, num_rounded, dtype=self.dtype, device=self.device, spare=2)
            return StaticForward(
                self.transformer, memory, self.capture, self._choice, lora=self._static_lora, compiled=self._compiled
            )

    def is_captured(self, inputs: Inputs, cache: KeyValueCache) -> bool:
        """Whether a step like this one replays a graph now."""
        static = self._static_of.get(cache)
        return static is not None and static.is_captured(inputs, cache)

    def refusal(self, cache: KeyValueCache) -> str | None:
        """Why nothing is captured over this cache although it should be; None: all is well."""
        static = self._static_of.get(cache)
        return None if static is None else static.graphs.refusal

    def describe(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        captured = "" if self.capture is None else ", captured"
        return f"torch {self.precision}, {self._kernel}{threads}{captured}"

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, cache: Cache) -> "TorchScores":
        assert isinstance(cache, KeyValueCache)
        static = self._static_of.get(cache)
        if static is not None:
            with self._lock:
                found = static(inputs, cache)
            if found is not None:
                return TorchScores(self, cache, inputs, hidden=found.hidden, logits=found.logits, numbers=found.numbers)
        device = self.device
        hidden = self.transformer(
            torch.tensor(inputs.tokens, device=device),
            torch.tensor(inputs.positions, device=device),
            CachedAttention(inputs.spans, cache, self._kernel, device),
            lora=self._lora,
            lora_rows=None if self._lora is None else torch.tensor(inputs.adapted, dtype=torch.long, device=device),
        )
        asked = torch.tensor(inputs.asked, dtype=torch.long, device=device)
        return TorchScores(self, cache, inputs, hidden=hidden[asked])


class TorchScores:
    """Logits with what was found beside them; or hidden states, whose logits are made when somebody asks."""

    def __init__(
        self,
        forward: TorchForward,
        cache: KeyValueCache,
        inputs: Inputs,
        *,
        hidden: Tensor,
        logits: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        self._forward = forward
        # while somebody may read the logits, nobody else's forward may use the memory where they lie
        self._cache = cache
        self._hidden = hidden
        self._logits = logits
        self._numbers = numbers

    @torch.inference_mode()
    def answers(self, start: int, stop: int) -> Answers:
        logits = self.logits(start, stop)
        forward = self._forward
        hidden = None if forward.draft_head is None else self._hidden[start:stop]
        answers = Answers(logits, hidden=hidden, draft_head=forward.draft_head)
        if forward.capture is None or start == stop:
            return answers
        if self._numbers is not None:
            numbers = self._numbers[:, start:stop]
        else:
            numbers = torch.empty(3, len(logits), dtype=torch.float64, device=logits.device)
            find_best(logits, forward.config.mask_token_id, numbers)
        return answers._replace(logsumexp=numbers[2], unread_best=numbers[0].long(), best_logits=numbers[1])

    @torch.inference_mode()
    def logits(self, start: int, stop: int) -> Tensor:
        if self._logits is not None:
            return self._logits[start:stop]
        return self._forward.transformer.logits(self._hidden[start:stop])
