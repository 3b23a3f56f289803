"""Attention of a ragged batch over a cache, and over itself in training: one contract, three kernels.

A kernel maps queries [B, H, T, K], keys and values [B, G, S, K] and a visibility (booleans [B or 1, T, S], or None where every
query sees every key) to [B, H, T, K]; query head h reads key-value head h // (H / G). `plain` is the formula written out and the
oracle of the others; `sdpa` is PyTorch's fused kernel; `flex` is FlexAttention, which skips blocks of a sparse view on a GPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from trimode.model.cache import KeyValueCache
from trimode.model.views import Causal, View, visible_matrix

__all__ = [
    "KERNELS",
    "Attend",
    "BlocksOverText",
    "CachedAttention",
    "Kernel",
    "KernelName",
    "NoisyBlocks",
    "PackedAttention",
    "Recorded",
    "SelfAttention",
    "Span",
]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
KernelName = Literal["plain", "sdpa", "flex"]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, H, K], k [N, G, K], v [N, G, K]) -> [N, H, K]: what a transformer layer calls."""


def plain(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    visible: Bool[Tensor, "b T S"] | None,
) -> Float[Tensor, "B H T K"]:
    """softmax(q k' / sqrt(K)) v, with the softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """PyTorch's fused attention."""
    mask = None if visible is None else _grouped_mask(visible, q.shape[1] // k.shape[1], q.dtype)
    return _grouped_sdpa(q, k, v, mask)


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    B, H, T, K = q.shape
    G = k.shape[1]
    # the query heads of a group become more queries of one head: keys and values are read once and never repeated in memory
    grouped = q.reshape(B, G, H // G * T, K)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(B, H, T, K)


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # needs no T x T mask in memory: 8,192 inputs would take 800 MB of them
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _grouped_mask(visible: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return mask.repeat(1, num_heads, 1)[:, None]


def flex(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """FlexAttention over a dense visibility."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if visible is not None:
        table = visible.expand(q.shape[0], -1, -1)
        block_mask = create_block_mask(
            lambda b, h, i, j: table[b, i, j], q.shape[0], None, q.shape[2], k.shape[2], device=str(q.device)
        )
    out = flex_attention(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


KERNELS: dict[KernelName, Kernel] = {"plain": plain, "sdpa": sdpa, "flex": flex}


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a forward: which of the packed inputs are its own, and where they go."""

    start: int
    """Index of its first input among the packed inputs."""
    length: int
    """Number of its inputs T."""
    slot: int
    """Its place in the cache."""
    cached: int
    """Its cursor: positions of the slot that every input sees."""
    view: View


@dataclass(slots=True)
class _Group:
    """Rows that one kernel call serves: as many inputs each, in slots that begin equally far apart and hold as many keys."""

    first: Span
    num_rows: int
    start: int
    """Where the first one's slot begins."""
    spacing: int
    """From one slot's beginning to the next one's."""
    num_keys: int
    is_prefill: bool
    """All of them start an empty slot and are causal."""
    visible: Tensor | None
    mask: Tensor | None = None
    """`visible` as the fused kernel takes it, made at its first layer."""


class CachedAttention:
    """Attention of one forward's rows over a cache. The plan and its masks are made once and serve all layers."""

    def __init__(
        self, spans: Sequence[Span], cache: KeyValueCache, kernel: KernelName, device: torch.device | str
    ) -> None:
        self._cache = cache
        self._kernel = KERNELS[kernel]
        self._fused = kernel == "sdpa"
        self._groups = [_group(rows, cache, device, needs_mask=not self._fused) for rows in _alike(spans, cache)]
        positions = [cache.starts[s.slot] + s.cached + i for s in spans for i in range(s.length)]
        self._flat_positions = torch.tensor(positions, dtype=torch.long, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._flat_positions, k, v)
        parts = []
        for g in self._groups:
            n, T = g.num_rows, g.first.length
            queries = q[g.first.start : g.first.start + n * T].view(n, T, *q.shape[1:]).transpose(1, 2)
            keys, values = self._cache.read(layer, g.start, g.spacing, n, g.num_keys)
            if self._fused and g.is_prefill:
                out = _causal_sdpa(queries, keys, values)
            elif self._fused:
                if g.visible is not None and g.mask is None:
                    g.mask = _grouped_mask(g.visible, q.shape[1] // k.shape[1], q.dtype)
                out = _grouped_sdpa(queries, keys, values, g.mask)
            else:
                out = self._kernel(queries, keys, values, g.visible)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _alike(spans: Sequence[Span], cache: KeyValueCache) -> list[list[Span]]:
    """Runs of rows that one kernel call can serve."""
    groups: list[list[Span]] = []
    num_keys = 0
    for span in spans:
        group = groups[-1] if groups else []
        together = max(num_keys, span.cached + span.length)
        if (
            group
            and group[-1].length == span.length
            and _continues([cache.starts[s.slot] for s in group], cache.starts[span.slot])
            # nobody reads beyond its own slot: what lies there is another row's, and a NaN survives a zero weight
            and all(together <= cache.lengths[s.slot] for s in (*group, span))
        ):
            group.append(span)
            num_keys = together
        else:
            groups.append([span])
            num_keys = span.cached + span.length
    return groups


def _continues(starts: list[int], start: int) -> bool:
    spacing = start - starts[-1]
    return spacing > 0 and (len(starts) == 1 or spacing == starts[-1] - starts[-2])


def _group(rows: list[Span], cache: KeyValueCache, device: torch.device | str, *, needs_mask: bool) -> _Group:
    num_keys = max(s.cached for s in rows) + rows[0].length
    is_prefill = all(s.cached == 0 and isinstance(s.view, Causal) for s in rows)
    visible = None
    if needs_mask or not is_prefill:
        visible = torch.stack([_over_prefix(s, num_keys, device) for s in rows])
        if bool(visible.all()):
            visible = None
    start = cache.starts[rows[0].slot]
    spacing = cache.starts[rows[1].slot] - start if len(rows) > 1 else 0
    return _Group(rows[0], len(rows), start, spacing, num_keys, is_prefill, visible)


def _over_prefix(span: Span, num_keys: int, device: torch.device | str) -> Tensor:
    """Visibility [T, S] of one row: the cached prefix for all, the view for its own inputs, nothing beyond."""
    visible = torch.zeros(span.length, num_keys, dtype=torch.bool, device=device)
    visible[:, : span.cached] = True
    visible[:, span.cached : span.cached + span.length] = visible_matrix(span.view, span.length, device)
    return visible


class SelfAttention:
    """Attention of whole sequences over themselves, without a cache: training, likelihood, checks."""

    def __init__(self, view: View, num_rows: int, length: int, kernel: KernelName, device: torch.device | str) -> None:
        self._shape = (num_rows, length)
        self._kernel = KERNELS[kernel]
        self._fused = kernel == "sdpa"
        self._is_causal = self._fused and isinstance(view, Causal)
        self._visible = None if self._is_causal else visible_matrix(view, length, device)[None]
        self._mask: Tensor | None = None
        """`_visible` as the fused kernel takes it, made at the first layer: one of a layer each would be kept for the gradient."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, self._shape).transpose(1, 2) for x in (q, k, v))
        if self._is_causal:
            out = _causal_sdpa(q, k, v)
        elif self._fused and self._visible is not None:
            if self._mask is None:
                self._mask = _grouped_mask(self._visible, q.shape[1] // k.shape[1], q.dtype)
            out = _grouped_sdpa(q, k, v, self._mask)
        else:
            out = self._kernel(q, k, v, self._visible)
        return out.transpose(1, 2).flatten(0, 1)


class PackedAttention:
    """Attention of several texts behind one another, each over itself and never across. For training."""

    def __init__(
        self, views: Sequence[View], lengths: Sequence[int], kernel: KernelName, device: torch.device | str
    ) -> None:
        self._device = device
        self._lengths = list(lengths)
        self._block_mask = _packed_block_mask(views, lengths, device) if kernel == "flex" else None
        self._each = (
            []
            if kernel == "flex"
            else [SelfAttention(view, 1, length, kernel, device) for view, length in zip(views, lengths, strict=True)]
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._block_mask is not None:
            from torch.nn.attention.flex_attention import flex_attention

            q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
            out = flex_attention(q, k, v, block_mask=self._block_mask, enable_gqa=True)
            assert isinstance(out, Tensor)
            return out[0].transpose(0, 1)
        parts = zip(self._each, *(x.split(self._lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attend(layer, *qkv) for attend, *qkv in parts])


def _packed_block_mask(views: Sequence[View], lengths: Sequence[int], device: torch.device | str):
    from torch.nn.attention.flex_attention import create_block_mask

    total = sum(lengths)
    table = torch.zeros(total, total, dtype=torch.bool, device=device)
    start = 0
    for view, length in zip(views, lengths, strict=True):
        table[start : start + length, start : start + length] = visible_matrix(view, length, device)
        start += length
    return create_block_mask(lambda b, h, i, j: table[i, j], None, None, total, total, device=str(device))


class Recorded:
    """An attention function that keeps the keys and values that pass through it, by layer."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer], self.values[layer] = k, v
        return self._attend(layer, q, k, v)


@dataclass(frozen=True, slots=True)
class NoisyBlocks:
    """Blocks of equal length over one clean text: each sees the text up to its anchor, and itself."""

    start: int
    """Index of the text's first token among the clean ones."""
    anchors: Tensor
    """[n] Places in the text of the last token that each block sees."""
    length: int
    """Inputs of a block."""


class BlocksOverText:
    """Attention of noisy blocks over recorded clean texts: what a decoder's block step sees, for many blocks at once."""

    def __init__(self, clean: Recorded, texts: Sequence[NoisyBlocks], *, causal: bool = False) -> None:
        """causal: a block's inputs see one another causally, as in a verification."""
        self._clean = clean
        self._texts = texts
        self._causal = causal
        self._hidden: list[Tensor] = []
        for text in texts:
            num_keys = int(text.anchors.max()) + 1
            places = torch.arange(num_keys, device=text.anchors.device)
            # [n, 1, num_keys]: the same for all inputs of a block
            self._hidden.append((places[None, :] > text.anchors[:, None])[:, None])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._clean.keys[layer], self._clean.values[layer]
        H, G, K = q.shape[1], k.shape[1], q.shape[2]
        outputs = []
        # split and not slices: the gradient of a slice is a whole tensor of zeros with the slice in it
        parts = zip(
            *(x.split([len(text.anchors) * text.length for text in self._texts]) for x in (q, k, v)), strict=True
        )
        for text, hidden, (q, k, v) in zip(self._texts, self._hidden, parts, strict=True):
            n, m, S = len(text.anchors), text.length, hidden.shape[-1]
            r = H // G
            # the query heads of a group become more queries of a block, [G, n, r m, K]: every product below is a plain batch of them
            queries = (q * K**-0.5).view(n, m, G, r, K).permute(2, 0, 3, 1, 4).reshape(G, n, r * m, K)
            block_keys, block_values = (x.view(n, m, G, K).permute(2, 0, 1, 3) for x in (k, v))
            text_keys, text_values = (x[text.start : text.start + S].transpose(0, 1) for x in (keys, values))
            over_text = (queries.reshape(G, -1, K) @ text_keys.mT).view(G, n, r * m, S)
            over_block = queries @ block_keys.mT
            if self._causal:
                later = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1).repeat(r, 1)
                over_block = over_block.masked_fill(later, float("-inf"))
            scores = torch.cat((over_text.masked_fill(hidden, float("-inf")), over_block), dim=-1)
            # sums inside are float32 in any dtype; asking for a float32 result costs as much again as all products
            over_text, over_block = scores.softmax(dim=-1).split([S, m], dim=-1)
            out = (over_text.reshape(G, -1, S) @ text_values).view(G, n, r * m, K) + over_block @ block_values
            outputs.append(out.view(G, n, r, m, K).permute(1, 3, 0, 2, 4).reshape(n * m, H, K))
        return torch.cat(outputs)
