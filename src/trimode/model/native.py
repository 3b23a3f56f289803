"""The engine in C++ for the CPU (`trimode._native`): float32, bfloat16 and int8 weights, every view, gated adapters.

A row's result never depends, bit for bit, on the rows that share its forward, so greedy self-speculation equals greedy autoregression
in every format. int8: weights keep at most 8 bits with a scale for each 32 inputs of an output, or 192 where the processor has tiles of
integers (weights that come in 4 bits from a GGUF file stay the very numbers they are); activations are rounded for each product, to 8
bits with a scale for each 32 of a row, or to 14 bits with one.
Keys and values are halves, except in float32.
"""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trimode.device import NATIVE_MISSING
from trimode.model.config import ModelConfig
from trimode.model.forward import Answers, Cache, Inputs
from trimode.model.lora import Lora
from trimode.model.rope import inverse_frequencies
from trimode.model.successor import num_candidates
from trimode.model.views import Causal, View, visible_matrix

try:
    from trimode import _native
except ImportError:  # built without a compiler
    _native = None

__all__ = [
    "BLOCKS",
    "WHY_MISSING",
    "NativeCache",
    "NativeForward",
    "NativeScores",
    "Precision",
    "available",
    "borrowed_matrix",
    "kernel_names",
    "new_matrix",
    "pick_threads",
    "why_not",
]

WHY_MISSING = NATIVE_MISSING

Precision = Literal["float32", "bfloat16", "int8"]

GROUP = 32
"""Inputs of an output that share a scale; 192 in s8."""
DEPTH = 64
"""What the inputs of a matrix may be padded to."""
FORMATS = {"float32": 0, "bfloat16": 1, "u8": 2, "u4": 3, "s8": 4}
BLOCKS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
MOST = 1 << 28
"""The engine's limit of any one size."""
_ROOM = 16
"""Slots begin at multiples of it: keys lie in blocks of 16 positions."""
_PLACES: dict[str, tuple[int, tuple[str, ...]]] = {
    "qkv": (0, ("query", "key", "value")),
    "output": (1, ("output",)),
    "gate_up": (2, ("gate", "up")),
    "down": (3, ("down",)),
}


_FORWARDS: "weakref.WeakSet[NativeForward]" = weakref.WeakSet()


def _unlock_all() -> None:
    for forward in list(_FORWARDS):
        forward.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)


def available() -> bool:
    """Whether the engine was built with this installation."""
    return _native is not None


def why_not(config: ModelConfig) -> str | None:
    """Why the engine does not run this model here; None where it does."""
    if _native is None:
        return WHY_MISSING
    sizes = (
        config.vocab_size,
        config.width,
        config.mlp_width,
        (config.num_heads + 2 * config.num_kv_heads) * config.head_size,
    )
    if max(sizes) > MOST:
        return f"a size of this model, {max(sizes):,}, is above its limit of {MOST:,}."
    if config.head_size % 2 or config.num_heads % config.num_kv_heads:
        return f"it has no heads of {config.head_size}, or {config.num_heads} of them over {config.num_kv_heads}."
    return None


def kernel_names() -> list[str]:
    """Kernel sets that this processor can run, the fastest first; empty without the engine."""
    return [] if _native is None else list(_native.kernels())


def new_matrix(kind: str, num_outputs: int, num_inputs: int) -> Any:
    """An empty matrix of a kind in FORMATS, to be packed row by row."""
    assert _native is not None
    return _native.Matrix(FORMATS[kind], num_outputs, num_inputs)


def borrowed_matrix(kind: str, num_outputs: int, num_inputs: int, panels: np.ndarray) -> Any:
    """A packed matrix whose bytes lie elsewhere, in a mapped file."""
    assert _native is not None
    return _native.Matrix.borrow(FORMATS[kind], num_outputs, num_inputs, panels)


@lru_cache(maxsize=64)
def _visible(view: View, length: int) -> np.ndarray | None:
    """The view as bytes [T, T]; None where it is plainly causal."""
    if isinstance(view, Causal) or view.num_causal(length) == length:
        return None
    return visible_matrix(view, length).to(torch.uint8).numpy()


class _Room:
    """Where the head's results go: memory that a forward uses again, since to make and free it takes as long as what a token needs of
    Python otherwise."""

    def __init__(self, array: np.ndarray, sums: np.ndarray, vocab_size: int) -> None:
        self.array, self.sums = array, sums
        self.logits = torch.from_numpy(array)[:, :vocab_size]
        self.logsumexp = torch.from_numpy(sums)

    @classmethod
    def new(cls, num_rows: int, vocab_size: int) -> "_Room":
        """Room that nobody else has."""
        array = np.empty((num_rows, (vocab_size + 15) // 16 * 16), np.float32)
        return cls(array, np.empty(num_rows, np.float32), vocab_size)


_MOST_KEPT = 32
"""Rows of logits whose memory stays with a cache."""


class NativeCache:
    """Keys and values in the engine's own layout."""

    def __init__(self, model: Any, lengths: Sequence[int], *, half: bool) -> None:
        self.lengths = list(lengths)
        self.starts: list[int] = []
        end = 0
        for length in lengths:
            self.starts.append(end)
            end += (length + _ROOM - 1) // _ROOM * _ROOM
        self.handle = model.make_cache(max(end, _ROOM), half)
        self._rooms: dict[int, _Room] = {}

    def place(self, slot: int, start: int, length: int) -> None:
        """Let a slot be these positions from now on; whoever places slots keeps them apart."""
        assert start % _ROOM == 0
        self.starts[slot], self.lengths[slot] = start, length

    def copy(self, source: int, target: int, num_positions: int) -> None:
        """Copy what lies at `source` and behind it to `target`, beginnings of slots both; the two may overlap."""
        self.handle.copy(source, target, num_positions)

    def room(self, num_rows: int, vocab_size: int) -> _Room | None:
        """For the logits of the forward at hand: the next one over this cache uses it again. None: for none, or for many."""
        if not 0 < num_rows <= _MOST_KEPT:
            return None
        found = self._rooms.get(num_rows)
        if found is None:
            whole = self._rooms.setdefault(_MOST_KEPT, _Room.new(_MOST_KEPT, vocab_size))
            found = self._rooms[num_rows] = _Room(whole.array[:num_rows], whole.sums[:num_rows], vocab_size)
        return found

    @property
    def num_bytes(self) -> int:
        """Memory held once it has been written to."""
        return self.handle.num_bytes + (self._rooms[_MOST_KEPT].array.nbytes if self._rooms else 0)


class NativeForward:
    """The whole model in C++. `set_tensor` fills it."""

    def __init__(
        self, config: ModelConfig, *, precision: Precision, threads: int | None = None, kernels: str | None = None
    ) -> None:
        assert _native is not None
        self.config = config
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.precision: str = precision
        frequencies, rope_scale = inverse_frequencies(config.rope, config.head_size)
        rope = config.rope
        num_threads = pick_threads(threads)
        self._model = _native.Model(
            config.vocab_size,
            config.width,
            config.mlp_width,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
            config.norm_eps,
            rope_scale,
            rope.llama4_beta or 0.0,
            rope.original_max_positions or 1,
            frequencies.numpy(),
            num_threads,
            kernels or _native.kernels()[0],
        )
        # float32 keeps weights of few bits as they are stored, and multiplies the numbers that they mean
        self._model.rounds_activations = precision == "int8"
        self.threads = num_threads
        self._norms: dict[int, dict[str, np.ndarray]] = {}
        self._maps: dict[tuple[int, str], dict[str, Any]] = {}
        self._kinds: dict[tuple[int, int], str] = {}
        self._kept: list[Any] = []
        """Whatever the engine borrows memory from."""
        self._has_successor = False
        self._lock = threading.Lock()
        _FORWARDS.add(self)

    def unlock(self) -> None:
        """Forget who was running a forward: in a forked child that thread does not exist."""
        self._lock = threading.Lock()

    @property
    def kernels(self) -> str:
        """The kernel set that runs."""
        return self._model.kernels

    def describe(self) -> str:
        return f"native {self.precision}, {self.kernels}, {self.threads} threads"

    def load(self, tensors: Mapping[str, Any] | Any) -> None:
        """Take packed matrices and float32 vectors by trimode's names, such as `layers.0.qkv.weight`."""
        for name, value in tensors:
            self._set(name, value)
        for layer, norms in self._norms.items():
            self._model.set_norms(
                layer, norms["attention_norm"], norms["mlp_norm"], norms.get("q_norm"), norms.get("k_norm")
            )
        for (layer, place), parts in self._maps.items():
            self._model.set_map(layer, _PLACES[place][0], parts["weight"], parts.get("bias"))
            self._kinds[layer, _PLACES[place][0]] = parts["weight"].kind
        self._norms, self._maps = {}, {}

    def _set(self, name: str, value: Any) -> None:
        self._kept.append(value)
        if name == "embedding.weight":
            self._model.set_embedding(value)
        elif name == "head.weight":
            self._model.set_head(value)
        elif name == "norm.weight":
            self._model.set_norm(value)
        else:
            _, layer, part, kind = name.split(".")
            if part.endswith("norm"):
                self._norms.setdefault(int(layer), {})[part] = value
            else:
                self._maps.setdefault((int(layer), part), {})[kind] = value

    def set_adapter(self, lora: Lora) -> None:
        """Take an adapter; it acts on the inputs that a forward names."""
        config = self.config
        widths = {part: outputs for part, (_, outputs) in config.part_sizes.items()}
        for layer in range(config.num_layers):
            for index, parts in _PLACES.values():
                found = [(part, *lora.factors[layer, part]) for part in parts if (layer, part) in lora.factors]
                if not found:
                    continue
                # each part's low numbers begin where a matrix may
                columns = [0]
                for _, A, _ in found:
                    columns.append(columns[-1] + -(-A.shape[0] // DEPTH) * DEPTH)
                stacked = torch.zeros(columns[-1], found[0][1].shape[1])
                offsets = {part: sum(widths[p] for p in parts[:i]) for i, part in enumerate(parts)}
                # its inputs are rounded as the base's are; 4 bits of its own numbers cost no draft that could be counted
                kind = "s8" if self._kinds.get((layer, index)) == "s8" else "u4"
                packed = []
                for column, (part, A, B) in zip(columns, found, strict=False):
                    stacked[column : column + A.shape[0]] = A.float()
                    packed.append((self._packed(B, B.dtype, kind), column, offsets[part]))
                self._model.set_adapter(layer, index, self._packed(stacked, found[0][1].dtype, kind), packed)
        embedding = None if lora.mask_embedding is None else lora.mask_embedding.float().numpy()
        self._model.set_adapter_scale(lora.scale, embedding)
        if lora.successor is not None:
            inner, outer = lora.successor.inner, lora.successor.outer
            halves = (*inner.chunk(2, dim=1), outer)
            self._model.set_successor(*(self._packed(w, w.dtype) for w in halves))
            self._has_successor = True

    def _packed(self, weight: Tensor, stored: torch.dtype, int8_kind: str | None = None) -> Any:
        plain = "bfloat16" if stored == torch.bfloat16 else "float32"
        kind = int8_kind if int8_kind is not None and self.precision == "int8" else plain
        matrix = new_matrix(kind, *weight.shape)
        matrix.pack_floats(0, weight.float().contiguous().numpy())
        self._kept.append(matrix)
        return matrix

    def make_cache(self, lengths: Sequence[int]) -> NativeCache:
        return NativeCache(self._model, lengths, half=self.precision != "float32")

    def __call__(self, inputs: Inputs, cache: Cache) -> "NativeScores":
        assert isinstance(cache, NativeCache)
        spans = [(s.start, s.length, cache.starts[s.slot], s.cached, _visible(s.view, s.length)) for s in inputs.spans]
        room = cache.room(len(inputs.asked), self.config.vocab_size)
        given = (inputs.tokens, inputs.positions, spans, cache.handle, inputs.adapted, inputs.asked)
        with self._lock:
            if room is None:
                return NativeScores(self, self._model.run(*given)[0])
            hidden, best = self._model.run(*given, self._mask, room.array, room.sums)
        return NativeScores(self, hidden, self._answers(hidden, room, best))

    def head(self, hidden: np.ndarray) -> Answers:
        """Logits of hidden states [n, D], and what is known of them beside."""
        room = _Room.new(len(hidden), self.config.vocab_size)
        with self._lock:
            best = self._model.head(hidden, self._mask, room.array, room.sums)
        return self._answers(hidden, room, best)

    def _answers(self, hidden: np.ndarray, room: _Room, best: list[int]) -> Answers:
        if self.draft_head is None:
            return Answers(room.logits, tuple(best), room.logsumexp)
        return Answers(room.logits, tuple(best), room.logsumexp, hidden=hidden, draft_head=self)

    @property
    def draft_head(self) -> "NativeForward | None":
        """Itself, with a successor."""
        return self if self._has_successor else None

    @property
    def _mask(self) -> int:
        return -1 if self.config.mask_token_id is None else self.config.mask_token_id

    def draft(self, hidden: np.ndarray, logits: Tensor, before: int) -> tuple[list[int], list[float]]:
        """See `decoding.interface.DraftHead`."""
        count = num_candidates(self.config.vocab_size)
        with self._lock:
            tokens, probabilities = self._model.draft(hidden, logits.numpy(), before, self._mask, count)
        return tokens.tolist(), probabilities.tolist()

    def drafted(self, hidden: np.ndarray, logits: Tensor, before: int | Tensor) -> Tensor:
        """See `decoding.interface.DraftHead`."""
        return torch.tensor(self.draft(hidden, logits, int(before)), dtype=torch.float64)

    def rescored(self, hidden: np.ndarray, logits: Tensor, before: int | Tensor) -> Tensor:
        """See `decoding.interface.DraftHead`."""
        count = num_candidates(self.config.vocab_size)
        with self._lock:
            tokens, scores = self._model.rescore(hidden, logits.numpy(), int(before), self._mask, count)
        return logits.scatter(-1, torch.from_numpy(tokens).long()[None], torch.from_numpy(scores)[None])


class NativeScores:
    """Hidden states of the inputs that a forward was asked for, and what the head made of few of them in the same call."""

    def __init__(self, forward: NativeForward, hidden: np.ndarray, found: Answers | None = None) -> None:
        self._forward = forward
        self._hidden = hidden
        self._found = found

    def answers(self, start: int, stop: int) -> Answers:
        if self._found is None:
            return self._forward.head(self._hidden[start:stop])
        if start == 0 and stop == len(self._hidden):
            return self._found
        found = self._found
        assert found.best is not None
        assert found.logsumexp is not None
        own = slice(start, stop)
        return found._replace(
            logits=found.logits[own],
            best=found.best[own],
            logsumexp=found.logsumexp[own],
            hidden=None if found.hidden is None else found.hidden[own],
        )

    def logits(self, start: int, stop: int) -> Tensor:
        return self.answers(start, stop).logits


def pick_threads(count: int | None) -> int:
    """As many threads as asked for, or as PyTorch uses."""
    return torch.get_num_threads() if count is None else count
