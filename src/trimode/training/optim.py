"""AdamW and how its learning rate moves."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["ScheduleName", "adamw", "learning_rate"]

ScheduleName = Literal["constant", "cosine", "wsd"]


def learning_rate(
    step: int, *, peak: float, steps: int, warmup: int, schedule: ScheduleName, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The rate of update `step` (from 0): linear warm-up, then constant, a half cosine, or warm-up-stable-decay.

    decay: share of the run in which wsd falls linearly. floor: share of the peak at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    start = steps - max(round(decay * steps), 1)
    if step < start:
        return peak
    return peak * (1 - (1 - floor) * min((step - start) / max(steps - start, 1), 1.0))


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], *, rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what requires gradients; vectors (norms, biases, embeddings of one token) are not decayed."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if (p.ndim > 1) == is_matrix and isinstance(p, DTensor) == is_sharded],
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for is_matrix in (True, False)
        for is_sharded in (True, False)  # one fused step cannot take both
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=betas, eps=1e-8)
