"""Does revision earn its place? Wrong tokens are planted in a block of known text, and the decoder's own revising passes go over it.

What is measured is `BlockDiffusion` itself: a generation is stopped behind its first forward, its canvas replaced by the text's
block with errors in it, and the loop goes on. A repair is a planted error that the committed block has right again; harm is a
right token that it has otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimode.decoding.block_diffusion import Progress
from trimode.decoding.generate import run_to_end
from trimode.decoding.interface import Generation
from trimode.diffusion.corruption import SampleNoise, plant_errors
from trimode.engine.language_model import LanguageModel
from trimode.errors import DataError

__all__ = ["Revision", "measure_revision"]

BATCH = 16
"""Blocks that share a forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """Counts over all blocks."""

    planted: int
    """Wrong tokens."""
    repaired: int
    """Of those, right again in the committed block."""
    right: int
    """Tokens that were right beside them."""
    harmed: int
    """Of those, otherwise in the committed block."""

    @property
    def repair_rate(self) -> float:
        return self.repaired / max(self.planted, 1)

    @property
    def harm_rate(self) -> float:
        return self.harmed / max(self.right, 1)


def measure_revision(
    model: LanguageModel,
    texts: Sequence[tuple[Sequence[int], int]],
    *,
    threshold: float,
    passes: int,
    block_length: int,
    error_ratio: float = 0.15,
    seed: int = 0,
) -> Revision:
    """Plant errors in every whole block of each text's answer and let `passes` passes with this editing threshold revise them.

    texts: ids and how many of them are the prompt; what is right is the text itself, best the model's own greedy answer.
    """
    blocks = [
        (list(ids[:start]), list(ids[start : start + block_length]))
        for ids, num_prompt in texts
        for start in range(max(num_prompt, 1), len(ids) - block_length + 1, block_length)
    ]
    if not blocks:
        raise DataError(f"No text has an answer of {block_length} tokens, a block to plant errors in.")
    knobs = {
        "mode": "diffusion",
        "block_length": block_length,
        "max_new_tokens": block_length,
        "editing_threshold": threshold,
        "max_post_steps": passes,
        "ignore_eos": True,
    }
    noise = SampleNoise(seed)
    planted = repaired = right = harmed = 0
    for first in range(0, len(blocks), BATCH):
        some = blocks[first : first + BATCH]
        generations = [model.open_answer(prefix, knobs).generation for prefix, _ in some]
        wrong = _revise(model, generations, [block for _, block in some], error_ratio, noise, first)
        for g, (_, block), hit in zip(generations, some, wrong, strict=True):
            for token, should, was_wrong in zip(g.new_tokens, block, hit, strict=True):
                planted, right = planted + was_wrong, right + (not was_wrong)
                repaired += was_wrong and token == should
                harmed += not was_wrong and token != should
    return Revision(planted=planted, repaired=repaired, right=right, harmed=harmed)


def _revise(
    model: LanguageModel,
    generations: list[Generation],
    blocks: list[list[int]],
    error_ratio: float,
    noise: SampleNoise,
    first: int,
) -> list[list[bool]]:
    """Run the generations to their ends over planted blocks; which tokens of each block were wrong."""
    # the block, and the scratch of a forward over it
    needs = [len(g.prompt) + 2 * len(block) for g, block in zip(generations, blocks, strict=True)]
    cache = model.forward.make_cache([max(needs)] * len(needs))
    runner = model.make_runner(cache)
    runner.seat(generations)
    loop = run_to_end(generations, runner)
    while not all(g.canvas for g in generations):
        next(loop)
    wrong = []
    for i, (g, block) in enumerate(zip(generations, blocks, strict=True)):
        # an anchor is final already, and was not revised: it counts as it stands
        num_final = g.num_new
        rest = torch.tensor(block[num_final:])
        noisy, hit = plant_errors(
            rest,
            torch.ones(len(rest), dtype=torch.bool),
            error_ratio,
            model.config.vocab_size,
            g.traits.mask_token_id,
            noise.of(first + i),
        )
        g.canvas = noisy.tolist()
        g.state = Progress(num_masked=len(rest), num_steps=1, step=1)
        wrong.append([False] * num_final + hit.tolist())
    for _ in loop:
        pass
    return wrong
