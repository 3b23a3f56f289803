"""Runs steps: from what decoders ask to one forward, and back to what they asked.

Alignment is done here and nowhere else: a causal row predicts the position after its own; a block row predicts its own, or the one
after it for checkpoints that were trained with a shift.
"""

import time
from collections.abc import Sequence

import torch

from trimode.decoding.interface import Generation, Predictions, Rows, Step
from trimode.model.attention import Span
from trimode.model.forward import Cache, Forward, Inputs

__all__ = ["Runner"]


class Runner:
    """One model and one cache; each generation has a slot of it."""

    def __init__(self, forward: Forward, cache: Cache) -> None:
        self._forward = forward
        self._cache = cache
        self._slots: dict[int, int] = {}
        self._shifted = forward.config.block_predicts == "next"
        logits = torch.empty(0, forward.config.vocab_size, dtype=forward.dtype, device=forward.device)
        self._no_rows = Rows(logits, (), torch.empty(0, device=forward.device))

    def seat(self, generations: Sequence[Generation]) -> None:
        """Give each generation its slot of the cache."""
        self._slots = {id(g): slot for slot, g in enumerate(generations)}

    def admit(self, generation: Generation, slot: int) -> None:
        """Give one more generation this slot."""
        self._slots[id(generation)] = slot

    def dismiss(self, generation: Generation) -> None:
        """Forget a generation; its slot may go to another."""
        del self._slots[id(generation)]

    def __call__(self, generations: Sequence[Generation], steps: Sequence[Step]) -> list[Predictions]:
        """One forward over all steps."""
        spans: list[Span] = []
        tokens: list[int] = []
        positions: list[int] = []
        adapted: list[int] = []
        asked: list[int] = []
        for g, step in zip(generations, steps, strict=True):
            start, length = len(tokens), len(step.tokens)
            spans.append(Span(start, length, self._slots[id(g)], g.cached, step.view))
            tokens.extend(step.tokens)
            positions.extend([g.cached + offset for offset in step.view.offsets(length)])
            asked.extend([start + i for i in step.after])
            if step.adapted:
                adapted.extend([start + i for i in step.adapted])
            if step.at:
                asked.extend([start + self._row_at(step, i) for i in step.at])
        inputs = Inputs(
            tokens=tokens,
            positions=positions,
            spans=spans,
            adapted=adapted,
            asked=asked,
        )
        begun = time.perf_counter()
        rows = Rows(*self._forward(inputs, self._cache).answers(0, len(asked)))
        return self._hand_out(rows, len(asked), steps, len(tokens), time.perf_counter() - begun)

    def _row_at(self, step: Step, index: int) -> int:
        return step.view.predecessor(index) if self._shifted else index

    def _hand_out(
        self, rows: Rows, num_rows: int, steps: Sequence[Step], num_inputs: int, seconds: float
    ) -> list[Predictions]:
        def part(start: int, stop: int) -> Rows:
            # slices of tensors are what a step of one token would spend most of its time on here
            if start == stop:
                return self._no_rows
            return rows if stop - start == num_rows else rows[start:stop]

        predictions = []
        start = 0
        for step in steps:
            middle = start + len(step.after)
            end = middle + len(step.at)
            predictions.append(
                Predictions(after=part(start, middle), at=part(middle, end), num_inputs=num_inputs, seconds=seconds)
            )
            start = end
        return predictions
