"""A forward as a device can replay it: a plain function of static tensors, with nothing in it that hangs on a length in Python.

Rows are padded to one length T and their number to B; what differs from step to step (tokens, where keys go, who sees whom, where a
row's cache begins and ends) comes in one tensor of integers, the *feed*. The one idea worth knowing: in every view of decoding a query
sees a leading run of its row's keys and perhaps one more run, so three integers a query say all of it, and one graph serves all views.

Two positions behind the cache make padding harmless: padding writes its keys to `scratch`, which nobody reads, and whatever a row
must not see is read from `blank`, which is always zero (a NaN of another row would survive a zero weight).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimode.model.attention import KERNELS, Span
from trimode.model.cache import KeyValueCache, Memory
from trimode.model.inputs import Inputs
from trimode.model.lora import Lora
from trimode.model.transformer import Transformer
from trimode.model.views import View, visible_matrix

__all__ = [
    "MOST_INPUTS",
    "STATIC_KERNELS",
    "Adapted",
    "Found",
    "Sight",
    "Static",
    "StaticAttention",
    "StaticKernel",
    "StaticShape",
    "fill_feed",
    "find_best",
    "reach",
    "run_static",
    "shape_of",
    "size_of_feed",
]

StaticKernel = Literal["plain", "sdpa", "flash", "flex"]
STATIC_KERNELS: tuple[StaticKernel, ...] = ("plain", "sdpa", "flash", "flex")
"""`flash` and `flex` read the cache where it lies; the others gather each row's keys first. `flash` knows no quadratic view."""
Sight = Literal["causal", "all", "both", "any"]
"""What a step's queries see: up to themselves, the whole row, each one or the other, or whatever the feed says."""

Adapted = Literal["none", "some", "all"]

MOST_INPUTS = 512
"""Padded inputs of a static forward. More of them keep a device busy for longer than they take to launch."""
LEAST_KEYS = 256
_FLEX_BLOCK = 128
_HEAD_ROWS = 64
"""Rows of logits that are held in float32 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticShape:
    """All that one graph is fixed to."""

    num_rows: int
    """B, padding included."""
    length: int
    """T: inputs of a row, padding included."""
    num_keys: int
    """S: keys that a row may have."""
    num_asked: int
    adapted: Adapted = "none"
    """Inputs that the adapter acts on. All of them need no mask, which saves a kernel a layer."""
    kernel: StaticKernel = "sdpa"
    sight: Sight = "any"

    @property
    def num_inputs(self) -> int:
        return self.num_rows * self.length


class Found(NamedTuple):
    """Where a static forward leaves its results."""

    hidden: Tensor
    """[most asked, D] in the model's dtype"""
    logits: Tensor
    """[most asked, V] in the model's dtype"""
    numbers: Tensor
    """float64 [3, most asked]: the arg-max without the mask token, its logit, the log-sum-exp."""


@dataclass(frozen=True, slots=True)
class Static:
    """Tensors whose addresses a graph holds: never reallocated, written to before a replay and read after it."""

    feed: Tensor
    found: Found
    memory: Memory

    def addresses(self) -> list[int]:
        """Where everything lies."""
        return [t.data_ptr() for t in (self.feed, *self.found, *self.memory.keys, *self.memory.values)]


# ---- on the host: what a step is, in numbers --------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def reach(view: View, length: int) -> np.ndarray | None:
    """What each of T inputs sees of them, [3, T]: all before `upto`, and those from `first` to before `stop`. None if the view is not
    of that kind."""
    visible = visible_matrix(view, length).numpy()
    hidden = ~visible
    upto = np.where(hidden.any(axis=1), hidden.argmax(axis=1), length)
    rest = visible & (np.arange(length) >= upto[:, None])
    first = np.where(rest.any(axis=1), rest.argmax(axis=1), 0)
    stop = first + rest.sum(axis=1)
    places = np.arange(length)
    told = (places < upto[:, None]) | ((places >= first[:, None]) & (places < stop[:, None]))
    return np.stack([upto, first, stop]) if np.array_equal(told, visible) else None


def shape_of(inputs: Inputs, cache: KeyValueCache, most_inputs: int = MOST_INPUTS) -> StaticShape | None:
    """The buckets that a step falls into; None if it is too wide, or of a view that three integers do not tell."""
    spans = inputs.spans
    num_rows = 1 << (len(spans) - 1).bit_length()
    length = _bucket(max(s.length for s in spans), least=1)
    if num_rows * length > most_inputs or any(reach(s.view, s.length) is None for s in spans):
        return None
    return StaticShape(
        num_rows=num_rows,
        length=length,
        num_keys=_bucket(max(s.cached + s.length for s in spans), least=LEAST_KEYS),
        num_asked=num_rows if len(inputs.asked) <= num_rows else num_rows * length,
        adapted="all" if len(inputs.adapted) == len(inputs.tokens) else "some" if len(inputs.adapted) else "none",
        sight=_sight(spans, cache, length),
    )


def _bucket(number: int, *, least: int) -> int:
    """The next power of two, or one of three steps between it and the one before: at most a quarter of it is padding. The steps
    are multiples of 8."""
    power = max(least, 1 << (number - 1).bit_length())
    step = power // 8
    return power if power == least or step < 8 else max(least, -(-number // step) * step)


def _sight(spans: Sequence[Span], cache: KeyValueCache, length: int) -> Sight:
    if length == 1:
        return "all"  # it is both, and FlashAttention splits the keys of one query among more of the device if they are all seen
    sights: set[Sight] = {_sight_of(s.view, s.length) for s in spans}
    # `flash` takes a row's last T keys for its inputs, padding included: they must lie within the memory
    inside = all(cache.starts[s.slot] + s.cached + length <= cache.memory.num_positions for s in spans)
    if "any" in sights or not inside:
        return "any"
    return next(iter(sights)) if len(sights) == 1 else "both"


@lru_cache(maxsize=512)
def _sight_of(view: View, length: int) -> Sight:
    told = reach(view, length)
    assert told is not None
    upto, first, stop = told
    up_to_itself = (upto == np.arange(1, length + 1)) & (first == stop)
    whole = upto == length
    if up_to_itself.all():
        return "causal"
    return "all" if whole.all() else "both" if (up_to_itself | whole).all() else "any"


def size_of_feed(shape: StaticShape) -> int:
    """Integers of a feed."""
    return 7 * shape.num_inputs + 4 * shape.num_rows + shape.num_asked


def fill_feed(feed: np.ndarray, shape: StaticShape, step: Inputs, cache: KeyValueCache) -> None:
    """Write a step into a feed, int64 [size_of_feed]."""
    B, T = shape.num_rows, shape.length
    inputs = feed[: 7 * B * T].reshape(7, B, T)
    rows = feed[7 * B * T : 7 * B * T + 4 * B].reshape(4, B)
    inputs[:] = 0
    inputs[2] = cache.memory.scratch
    # padding sees one key: the softmax over none would be NaN
    inputs[3] = 1
    rows[:] = 0
    rows[2:] = 1
    padded = np.empty(len(step.tokens), dtype=np.int64)
    for b, s in enumerate(step.spans):
        n, own, start = s.length, slice(s.start, s.start + s.length), cache.starts[s.slot]
        count = np.arange(n)
        inputs[0, b, :n] = step.tokens[own]
        inputs[1, b, :n] = step.positions[own]
        inputs[2, b, :n] = start + s.cached + count
        told = reach(s.view, n)
        assert told is not None
        inputs[3:6, b, :n] = told + s.cached
        rows[:, b] = start, s.cached + n, s.cached + n, s.cached + T
        padded[own] = b * T + count
    inputs[6].reshape(-1)[padded[list(step.adapted)]] = 1
    places = feed[7 * B * T + 4 * B :][: shape.num_asked]
    places[:] = 0
    places[: len(step.asked)] = padded[list(step.asked)]


# ---- on the device: the same numbers, and the forward -----------------------------------------------------------------------


class _Feed(NamedTuple):
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    """[N] where each input's keys go"""
    upto: Tensor
    first: Tensor
    stop: Tensor
    """[B, T, 1] what each query sees, in positions of its row"""
    acts: Tensor
    """bool [N, 1]: the adapter acts here"""
    starts: Tensor
    """[B, 1] where each row's slot begins"""
    ends: Tensor
    """[B, 1] its keys, those of this step included"""
    used: Tensor
    used_padded: Tensor
    """int32 [B]: its keys, without and with those of padding; one at least"""
    asked: Tensor


def _read_feed(feed: Tensor, shape: StaticShape) -> _Feed:
    B, T, N = shape.num_rows, shape.length, shape.num_inputs
    inputs, rows = feed[: 7 * N].view(7, N), feed[7 * N : 7 * N + 4 * B].view(4, B)
    upto, first, stop = inputs[3:6].view(3, B, T, 1).unbind()
    used, used_padded = rows[2:].to(torch.int32).unbind()
    return _Feed(
        *inputs[:3].unbind(),
        upto=upto,
        first=first,
        stop=stop,
        acts=inputs[6, :, None] == 1,
        starts=rows[0, :, None],
        ends=rows[1, :, None],
        used=used,
        used_padded=used_padded,
        asked=feed[7 * N + 4 * B :][: shape.num_asked],
    )


class StaticAttention:
    """Attention of B rows of T inputs over a cache whose cursors lie on the device."""

    def __init__(self, shape: StaticShape, feed: Tensor, memory: Memory, *, num_heads: int, dtype: torch.dtype) -> None:
        self._shape = shape
        self._memory = memory
        self._feed = _read_feed(feed, shape)
        self._attend = getattr(self, f"_{shape.kernel}")
        f = self._feed
        if shape.kernel in ("plain", "sdpa"):
            places = torch.arange(shape.num_keys, device=feed.device)
            self._where = torch.where(places < f.ends, f.starts + places, memory.blank).flatten()
            self._visible = (places < f.upto) | ((places >= f.first) & (places < f.stop))
            if shape.kernel == "sdpa":
                zero = torch.zeros((), dtype=dtype, device=feed.device)
                mask = zero.masked_fill(~self._visible, float("-inf"))
                # the query heads of a group become more queries of one head, as in `attention.sdpa`
                num_grouped = num_heads // memory.keys[0].shape[1]
                self._mask = mask.repeat(1, num_grouped, 1)[:, None]
        elif shape.kernel == "flash":
            self._query_ends = torch.arange(
                0, shape.num_inputs + 1, shape.length, dtype=torch.int32, device=feed.device
            )
            self._key_starts = torch.nn.functional.pad(f.starts[:, 0], (0, 1)).to(torch.int32)
            self._sees_all = (f.upto == f.ends[:, None]).view(-1, 1, 1)
        else:
            self._block_mask = _block_mask(f, shape, memory)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        keys.index_copy_(0, self._feed.targets, k)
        values.index_copy_(0, self._feed.targets, v)
        return self._attend(q, keys, values)

    def _gathered(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, S = self._shape.num_rows, self._shape.length, self._shape.num_keys
        k, v = (x.index_select(0, self._where).view(B, S, *x.shape[1:]).transpose(1, 2) for x in (keys, values))
        return q.view(B, T, *q.shape[1:]).transpose(1, 2), k, v

    def _plain(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self._gathered(q, keys, values)
        return KERNELS["plain"](q, k, v, self._visible).transpose(1, 2).flatten(0, 1)

    def _sdpa(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self._gathered(q, keys, values)
        B, H, T, K = q.shape
        grouped = q.reshape(B, k.shape[1], -1, K)
        out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=self._mask)
        return out.reshape(B, H, T, K).transpose(1, 2).flatten(0, 1)

    def _flash(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        sight = self._shape.sight
        outs = []
        if sight != "causal":
            outs.append(self._flash_call(q, keys, values, self._feed.used, -1))
        if sight != "all":
            outs.append(self._flash_call(q, keys, values, self._feed.used_padded, 0))
        return outs[0] if len(outs) == 1 else torch.where(self._sees_all, *outs)

    def _flash_call(self, q: Tensor, keys: Tensor, values: Tensor, used: Tensor, right: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q,
            keys,
            values,
            self._query_ends,
            self._key_starts,
            self._shape.length,
            # a row's keys with those of its padding
            self._shape.num_keys + self._shape.length,
            window_size=(-1, right),
            enable_gqa=True,
            seqused_k=used,
        )
        assert isinstance(out, Tensor)
        return out

    def _flex(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        B, T = self._shape.num_rows, self._shape.length
        q = q.view(B, T, *q.shape[1:]).transpose(1, 2).contiguous()
        # one batch of keys for all rows: each row's block mask points to its own part of them
        k, v = (x.transpose(0, 1)[None].expand(B, -1, -1, -1) for x in (keys, values))
        out = _flex_attention(q.is_cuda)(q, k, v, block_mask=self._block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    # one program a shape: what is captured never changes its shape, and dynamic shapes are where compilers surprise
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _block_mask(f: _Feed, shape: StaticShape, memory: Memory):
    """Which blocks of the whole memory a row's queries look into, and what they see of them."""
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks = -(-memory.keys[0].shape[0] // _FLEX_BLOCK)
    blocks = torch.arange(num_blocks, device=f.starts.device)
    needed = (blocks >= f.starts // _FLEX_BLOCK) & (blocks * _FLEX_BLOCK < f.starts + f.ends.clamp(min=1))
    order = torch.argsort(needed.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    num_query_blocks = -(-shape.length // _FLEX_BLOCK)
    count = needed.sum(dim=-1, dtype=torch.int32)[:, None, None].expand(-1, 1, num_query_blocks)
    order = order[:, None, None].expand(-1, 1, num_query_blocks, -1)
    begins = f.starts[:, 0]
    # positions of the memory; the kernel asks about queries up to the end of its block, so there must be as many
    to_block = (0, num_query_blocks * _FLEX_BLOCK - shape.length)
    upto, first, stop = (torch.nn.functional.pad(x[..., 0] + f.starts, to_block) for x in (f.upto, f.first, f.stop))
    return BlockMask.from_kv_blocks(
        count.contiguous(),
        order.contiguous(),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=lambda b, h, i, j: (j >= begins[b]) & ((j < upto[b, i]) | ((j >= first[b, i]) & (j < stop[b, i]))),
        seq_lengths=(shape.length, memory.keys[0].shape[0]),
    )


def run_static(transformer: Transformer, lora: Lora | None, shape: StaticShape, static: Static) -> None:
    """One forward from the feed: keys and values go into the memory, results to where `static.found` says."""
    feed = _read_feed(static.feed, shape)
    config = transformer.config
    dtype = static.found.logits.dtype
    attend = StaticAttention(shape, static.feed, static.memory, num_heads=config.num_heads, dtype=dtype)
    hidden = transformer(
        feed.tokens,
        feed.positions,
        attend,
        lora=None if shape.adapted == "none" else lora,
        lora_rows=torch.arange(shape.num_inputs, device=feed.tokens.device) if shape.adapted == "all" else None,
        lora_acts=feed.acts if shape.adapted == "some" else None,
    )
    asked = hidden.index_select(0, feed.asked)
    static.found.hidden[: shape.num_asked].copy_(asked)
    logits = static.found.logits[: shape.num_asked]
    logits.copy_(transformer.logits(asked))
    find_best(logits, config.mask_token_id, static.found.numbers[:, : shape.num_asked])


def find_best(logits: Tensor, but: int | None, numbers: Tensor) -> None:
    """Of logits [n, V]: the arg-max without the token `but`, its logit, and the log-sum-exp with it, into float64 [3, n]."""
    for rows, best, top, total in zip(
        logits.split(_HEAD_ROWS), *(x.split(_HEAD_ROWS) for x in numbers.unbind()), strict=True
    ):
        total.copy_(rows.float().logsumexp(dim=-1))
        if but is None:
            index = rows.argmax(dim=-1)
        else:
            # its column is put aside for the arg-max: a copy of all columns would take longer than the search
            column = rows.select(1, but)
            kept = column.clone()
            column.fill_(float("-inf"))
            index = rows.argmax(dim=-1)
            column.copy_(kept)
        best.copy_(index)
        top.copy_(rows.gather(-1, index[:, None])[:, 0])
