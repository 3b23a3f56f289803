"""Log-likelihood under both views of one checkpoint: exact through the causal view, bounded through the block view.

As it generates, so it is scored: the first token behind a block's prefix comes from the causal view, exactly; the places behind it are
filled in any order, and averaging over all orders bounds their log-likelihood from below (`diffusion.bound`). Blocks see the true
text before them. Probabilities are the model's own, what it gives to the mask included, as in its training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimode.diffusion.bound import Estimate, MaskDraw, combine, draw_by_count, draw_by_time
from trimode.errors import PromptError, SettingError
from trimode.evaluation.blocks import BlockAsk, BlockReader

__all__ = ["AutoregressiveScore", "DiffusionScore", "autoregressive_score", "diffusion_score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoregressiveScore:
    """Exact log-likelihood of a continuation."""

    logprobs: tuple[float, ...]
    """Of each token, in nats."""
    is_greedy: bool
    """Each token is the likeliest one, the mask excepted."""

    @property
    def total(self) -> float:
        """Nats."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionScore:
    """A lower bound on the log-likelihood that a diffusion sampler of this checkpoint gives to a continuation."""

    total: float
    """Nats: the bound, or an estimate of it."""
    standard_error: float
    """Of the estimate, from the draws themselves; 0.0 where every set of masks was taken."""
    exact: float
    """The share of `total` that comes from first tokens of blocks, which are exact."""
    num_tokens: int
    num_forwards: int
    """Block rows that were run."""


def autoregressive_score(model: Any, context: Sequence[int], target: Sequence[int]) -> AutoregressiveScore:
    """log p(target | context) through the causal view. Raises PromptError for an empty side, ContextLengthError."""
    _check(context, target)
    reader = BlockReader(model, len(context) + len(target), {"mode": "ar"}, rows=0)
    logprobs, is_greedy = _read_exactly(reader, context, target)
    return AutoregressiveScore(logprobs=tuple(logprobs), is_greedy=is_greedy)


def diffusion_score(
    model: Any,
    context: Sequence[int],
    target: Sequence[int],
    *,
    block_length: int | None = None,
    samples: int | None = 4,
    method: str = "counts",
    seed: int = 0,
    knobs: Mapping[str, Any] | None = None,
) -> DiffusionScore:
    """A bound on log p(target | context) through the block view, block by block from the context's end.

    samples: sets of masked places for each number of masks (method "counts"), or ratios a block (method "times"); None takes every
    set, 2^places rows a block. knobs: `draft_lora`. Raises PromptError, SettingError, ContextLengthError, MissingMaskTokenError.
    """
    _check(context, target)
    if method not in ("counts", "times"):
        raise SettingError(f"method must be 'counts' or 'times'; got {method!r}.")
    if method == "times" and samples is None:
        raise SettingError("method 'times' has no end: give samples, or take method 'counts'.")
    asked = dict(knobs or {}) | ({} if block_length is None else {"block_length": block_length})
    capacity = len(context) + len(target)
    reader = BlockReader(model, capacity, asked)
    logprobs, _ = _read_exactly(reader, context, target)
    generator = torch.Generator().manual_seed(seed)
    text = reader.text
    first_tokens: list[float] = []
    blocks: list[tuple[int, int, list[MaskDraw]]] = []
    for start in range(len(context), capacity, reader.block_length):
        first_tokens.append(logprobs[start - len(context)])
        places = min(reader.block_length, capacity - start) - 1
        if places == 0:
            continue
        draws = (
            draw_by_time(places, samples or 0, generator)
            if method == "times"
            else draw_by_count(places, samples, generator)
        )
        blocks.append((start + 1, places, draws))
    losses = _losses(reader, text, blocks)
    bound = Estimate(0.0)
    num_forwards = 0
    for prefix, _, draws in blocks:
        by_set = {masked: losses[prefix, masked] for masked in {d.masked for d in draws} if masked}
        num_forwards += len(by_set)
        bound = bound + combine(draws, by_set)
    exact = math.fsum(first_tokens)
    return DiffusionScore(
        total=exact - bound.value,
        standard_error=bound.standard_error,
        exact=exact,
        num_tokens=len(target),
        num_forwards=num_forwards,
    )


def _read_exactly(reader: BlockReader, context: Sequence[int], target: Sequence[int]) -> tuple[list[float], bool]:
    """log p of each target token, and whether each is the likeliest one. Leaves the whole text in the reader."""
    ids = [*context, *target]
    mask = reader.traits.mask_token_id
    logprobs: list[float] = []
    is_greedy = True
    # the last context token predicts the first target
    for _ in reader.read(ids[: len(context) - 1], last_only=True):
        pass
    for first, logits in reader.read(ids[len(context) - 1 :]):
        wanted = ids[first + 1 : first + 1 + len(logits)]
        scores = logits[: len(wanted)].float()
        if not wanted:
            continue
        index = torch.tensor(wanted, device=scores.device)[:, None]
        logprobs += scores.log_softmax(dim=-1).gather(-1, index)[:, 0].tolist()
        if mask >= 0:
            scores = scores.index_fill(1, torch.tensor([mask], device=scores.device), float("-inf"))
        is_greedy = is_greedy and bool((scores.argmax(dim=-1) == index[:, 0]).all())
    return logprobs, is_greedy


def _losses(
    reader: BlockReader, text: Sequence[int], blocks: Sequence[tuple[int, int, list[MaskDraw]]]
) -> dict[tuple[int, tuple[int, ...]], float]:
    """The summed -log p of the masked places, by (prefix, masked places)."""
    mask = reader.traits.mask_token_id
    keys: list[tuple[int, tuple[int, ...]]] = []
    asks: list[BlockAsk] = []
    for prefix, places, draws in blocks:
        for masked in sorted({d.masked for d in draws if d.masked}):
            canvas = list(text[prefix : prefix + places])
            for place in masked:
                canvas[place] = mask
            keys.append((prefix, masked))
            asks.append(BlockAsk(prefix=prefix, canvas=tuple(canvas)))
    return {key: _loss(text, key, logits) for key, logits in zip(keys, reader.look(asks), strict=True)}


def _loss(text: Sequence[int], key: tuple[int, tuple[int, ...]], logits: torch.Tensor) -> float:
    prefix, masked = key
    logprobs = logits.float().log_softmax(dim=-1)
    index = torch.tensor([text[prefix + place] for place in masked], device=logits.device)[:, None]
    return -float(logprobs.gather(-1, index).double().sum())


def _check(context: Sequence[int], target: Sequence[int]) -> None:
    if not context or not target:
        side = "context" if not context else "continuation"
        raise PromptError(f"The {side} has no tokens: a likelihood needs at least one on each side.")
