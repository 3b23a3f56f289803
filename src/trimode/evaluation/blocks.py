"""One text in the cache, and what the block view says over prefixes of it: many partly masked blocks in one forward.

Steps come from the real decoders and run through the model's own runner, so the alignment of rows, the adapter's places and what is
causal are those of generation and are stated nowhere a second time. Slot 0 holds the clean text; each row has a slot with a copy,
whose end its step may spoil.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimode.decoding.block_diffusion import BlockDiffusion, Progress
from trimode.decoding.generate import tick
from trimode.decoding.interface import Generation, Step
from trimode.decoding.self_speculation import Draft, LinearSelfSpeculation
from trimode.errors import ContextLengthError
from trimode.model.views import Causal

__all__ = ["BlockAsk", "BlockReader"]

PIECE = 128
"""Inputs of a causal forward, and the rows of logits that it may hold at once."""
ROWS = 16
"""Blocks that share a forward, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAsk:
    """A partly masked block behind a prefix of the text."""

    prefix: int
    """Tokens of the text that are final; the last of them leads the block."""
    canvas: tuple[int, ...]
    """The places behind the prefix: tokens, and the mask where one is asked for."""
    purpose: Literal["denoise", "draft"] = "denoise"
    """As diffusion would fill it, or as a self-speculation draft: the adapter and the causal places may differ."""


class BlockReader:
    """Reads one text at a time with a model. `capacity`: most tokens of text and block together."""

    def __init__(self, model: Any, capacity: int, knobs: Mapping[str, Any], *, rows: int = ROWS) -> None:
        if capacity > model.config.max_positions:
            raise ContextLengthError(
                f"Text and block take {capacity:,} positions; the context holds {model.config.max_positions:,}. Use less."
            )
        like = model.open_answer([0], {"mode": "diffusion", "max_new_tokens": 1, **knobs}).generation
        self.traits = like.traits
        self.settings = replace(like.settings, max_new_tokens=capacity)
        self.block_length = self.settings.block_length or self.traits.block_length
        self.text: list[int] = []
        """What slot 0 holds."""
        self._rows = rows
        # a step over a block may be one input longer than what it leaves final
        self._cache = model.forward.make_cache([capacity + 1] * (rows + 1))
        self._runner = model.make_runner(self._cache)
        self._same = [0] * (rows + 1)
        """Of each slot: leading positions that equal slot 0's."""

    @property
    def num_places(self) -> int:
        """Places of a block behind what is final."""
        return self.block_length - (not self.traits.first_is_exact)

    def read(self, ids: Sequence[int], *, last_only: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Append these ids to the text, causally. Yields, piece by piece, the place in the text of a first id and the logits
        [n, V] after it and those behind it; with `last_only` those after the very last id alone."""
        for start in range(0, len(ids), PIECE):
            piece = tuple(ids[start : start + PIECE])
            is_last = start + len(piece) == len(ids)
            after = tuple(range(len(piece))) if not last_only else (len(piece) - 1,) if is_last else ()
            g = self._generation([*self.text, *piece], len(self.text))
            step = Step(kind="prefill", tokens=piece, view=Causal(), after=after)
            first = len(self.text) + (after[0] if after else 0)
            logits = self._run([g], [step], [0])[0].after.logits
            self.text += piece
            if after:
                yield first, logits

    def forget(self, length: int) -> None:
        """Keep only so many leading tokens of the text."""
        del self.text[length:]
        self._same = [min(same, length) for same in self._same]

    def look(self, asks: Sequence[BlockAsk]) -> Iterator[Tensor]:
        """For each block the logits [masks, V] at its masked places, left to right; use each before asking for the next."""
        for start in range(0, len(asks), self._rows):
            rows = [self._plan(ask) for ask in asks[start : start + self._rows]]
            # rows of one length share a kernel call when they lie side by side
            order = sorted(range(len(rows)), key=lambda i: len(rows[i][1].tokens))
            found = self._run([rows[i][0] for i in order], [rows[i][1] for i in order], range(1, len(rows) + 1))
            by_ask = dict(zip(order, found, strict=True))
            for i in range(len(rows)):
                yield (by_ask[i].after if len(by_ask[i].after) else by_ask[i].at).logits

    def decode_block(self, prefix: int) -> tuple[list[int], int]:
        """What the real policy makes of the block behind a prefix: its tokens up to an end of text, and the denoising forwards that
        they took."""
        mask = self.traits.mask_token_id
        g = self._generation(self.text[:prefix], prefix - 1)
        g.decoder = BlockDiffusion()
        g.settings = replace(self.settings, max_new_tokens=self.num_places)
        g.canvas = [mask] * self.num_places
        steps = self.settings.max_denoising_steps or self.block_length
        g.state = Progress(num_masked=self.num_places, num_steps=steps)
        self._copy(1, prefix - 1)
        self._runner.admit(g, 1)
        passes = 0
        while g.finish_reason is None:
            tick([g], self._runner)
            passes += 1
        self._runner.dismiss(g)
        return g.new_tokens, passes

    def _generation(self, final: Sequence[int], cached: int) -> Generation:
        g = Generation(
            prompt=tuple(final),
            settings=self.settings,
            traits=self.traits,
            random=torch.Generator(),
            decoder=BlockDiffusion(),
        )
        g.cached = cached
        return g

    def _plan(self, ask: BlockAsk) -> tuple[Generation, Step]:
        mask = self.traits.mask_token_id
        exact = self.traits.first_is_exact
        canvas = list(ask.canvas)
        final = self.text[: ask.prefix]
        if exact:
            # what leads the canvas without a gap is final there: all of it in diffusion, the first token in a draft
            num_lead = canvas.index(mask)
            num_lead = min(num_lead, 1) if ask.purpose == "draft" else num_lead
            final, canvas = final + canvas[:num_lead], canvas[num_lead:]
        g = self._generation(final, ask.prefix - 1)
        g.canvas = canvas
        if ask.purpose == "denoise":
            g.state = Progress(num_masked=canvas.count(mask), num_steps=self.block_length)
            return g, BlockDiffusion().plan_one(g)
        if not (exact and len(canvas) == len(ask.canvas)):
            g.state = Draft()
        # otherwise the first pass of an exact kind, which the decoder starts by itself
        return g, LinearSelfSpeculation().plan_one(g)

    def _run(self, generations: Sequence[Generation], steps: Sequence[Step], slots: Sequence[int]) -> list[Any]:
        for g, slot in zip(generations, slots, strict=True):
            if slot:
                self._copy(slot, g.cached)
            self._runner.admit(g, slot)
        predictions = self._runner(generations, steps)
        for g in generations:
            self._runner.dismiss(g)
        return predictions

    def _copy(self, slot: int, length: int) -> None:
        """Make the leading positions of a slot equal slot 0's; what lies behind will be overwritten."""
        # engines keep keys in pieces of 16 positions: a copy starts where one does
        same = self._same[slot] // 16 * 16
        if self._same[slot] < length:
            starts = self._cache.starts
            self._cache.copy(starts[0] + same, starts[slot] + same, length - same)
        self._same[slot] = length
