"""What a forward over T positions costs: the price list behind every choice of a block length."""

import statistics
import time
from typing import Any

import torch

from trimode.decoding.autoregressive import Autoregressive
from trimode.decoding.interface import Generation, Step, Traits
from trimode.decoding.settings import Settings
from trimode.model.views import Causal

__all__ = ["NUM_POSITIONS", "forward_costs"]

NUM_POSITIONS = (1, 2, 4, 8, 16, 32)
NUM_CACHED = 256


def forward_costs(model: Any, *, rounds: int = 7) -> dict[str, Any]:
    """Seconds of a causal forward over T positions behind a cached prefix, all logits included; interleaved over T.

    `times_one`: median of the ratio to the forward over one position of the same round, which drift cannot distort.
    """
    cached = min(NUM_CACHED, model.config.max_positions - max(NUM_POSITIONS))
    generation = Generation(
        prompt=(0,) * (cached + 1),
        settings=Settings(),
        traits=Traits(mask_token_id=-1, eos_token_ids=frozenset(), block_length=1),
        random=torch.Generator(),
        decoder=Autoregressive(),
    )
    generation.cached = cached
    run = model.make_runner(model.forward.make_cache([cached + max(NUM_POSITIONS)]))
    run.seat([generation])
    taken: dict[int, list[float]] = {T: [] for T in NUM_POSITIONS}
    for round_ in range(-2, rounds):
        for T in NUM_POSITIONS:
            tokens = tuple(i % model.config.vocab_size for i in range(T))
            step = Step(kind="verify", tokens=tokens, view=Causal(), after=tuple(range(T)))
            start = time.perf_counter()
            predictions = run([generation], [step])
            float(predictions[0].after.logits[0, 0])  # a GPU's work is done only when somebody looks
            if round_ >= 0:
                taken[T].append(time.perf_counter() - start)
    return {
        "cached": cached,
        "positions": list(NUM_POSITIONS),
        "seconds": [statistics.median(taken[T]) for T in NUM_POSITIONS],
        "times_one": [statistics.median(a / b for a, b in zip(taken[T], taken[1], strict=True)) for T in NUM_POSITIONS],
    }
