"""Runs steps: from what decoders ask to one forward, and back to what they asked.

Alignment is done here and nowhere else: a causal row predicts the position after its own; a block row predicts its own, or the one
after it for checkpoints that were trained with a shift.
"""

from collections.abc import Sequence

import torch

from trimode.decoding.interface import Generation, Predictions, Step
from trimode.model.attention import CachedAttention, KernelName, Span
from trimode.model.cache import KeyValueCache
from trimode.model.lora import Lora
from trimode.model.transformer import Transformer

__all__ = ["Runner"]


class Runner:
    """One transformer and one cache; each generation has a slot of it."""

    def __init__(
        self, transformer: Transformer, cache: KeyValueCache, *, lora: Lora | None = None, kernel: KernelName = "sdpa"
    ) -> None:
        self._transformer = transformer
        self._cache = cache
        self._lora = lora
        self._kernel: KernelName = kernel
        self._slots: dict[int, int] = {}
        self._shifted = transformer.config.block_predicts == "next"

    def seat(self, generations: Sequence[Generation]) -> None:
        """Give each generation its slot of the cache."""
        self._slots = {id(g): slot for slot, g in enumerate(generations)}

    def admit(self, generation: Generation, slot: int) -> None:
        """Give one more generation this slot."""
        self._slots[id(generation)] = slot

    def dismiss(self, generation: Generation) -> None:
        """Forget a generation; its slot may go to another."""
        del self._slots[id(generation)]

    @torch.inference_mode()
    def __call__(self, generations: Sequence[Generation], steps: Sequence[Step]) -> list[Predictions]:
        """One forward over all steps."""
        device = self._transformer.embedding.weight.device
        spans: list[Span] = []
        tokens: list[int] = []
        positions: list[int] = []
        adapted: list[int] = []
        asked: list[int] = []
        for g, step in zip(generations, steps, strict=True):
            start, length = len(tokens), len(step.tokens)
            spans.append(Span(start, length, self._slots[id(g)], g.cached, step.view))
            tokens.extend(step.tokens)
            positions.extend(g.cached + offset for offset in step.view.offsets(length))
            adapted.extend(start + i for i in step.adapted)
            asked.extend(start + i for i in step.after)
            asked.extend(start + self._row_at(step, i) for i in step.at)
        attend = CachedAttention(spans, self._cache, self._kernel, device)
        hidden = self._transformer(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            attend,
            lora=self._lora,
            lora_rows=torch.tensor(adapted, dtype=torch.long, device=device) if self._lora is not None else None,
        )
        logits = self._transformer.logits(hidden[torch.tensor(asked, dtype=torch.long, device=device)])
        return _hand_out(logits, steps)

    def _row_at(self, step: Step, index: int) -> int:
        return step.view.predecessor(index) if self._shifted else index


def _hand_out(logits: torch.Tensor, steps: Sequence[Step]) -> list[Predictions]:
    predictions = []
    start = 0
    for step in steps:
        middle = start + len(step.after)
        end = middle + len(step.at)
        predictions.append(Predictions(after=logits[start:middle], at=logits[middle:end]))
        start = end
    return predictions
