"""What losses need of the logits, without keeping several copies of [n, V]: the log of their sum and a few of them.

Cross-entropy, KL over a teacher's likeliest tokens and total variation are all functions of the logsumexp and of some scores a row.
With the gradient written out, one bfloat16 copy of the logits and one product are all that the vocabulary costs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["head_statistics"]

CHUNK_ROWS = 64
"""Rows whose logits are widened to float32 at once: 64 rows of 49,152 are 12 MB, which a cache holds."""


def head_statistics(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], wanted: Int[Tensor, "n k"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n k"], Int[Tensor, " n"]]:
    """Of the logits hidden @ weight.T: their logsumexp, the scores of the wanted tokens (float32), and the likeliest token."""
    lse, scores, best = _HeadStatistics.apply(hidden, weight, wanted)
    return lse, scores, best


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor):
        logits = hidden @ weight.T
        lse = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        # one buffer for all chunks: fresh memory of this size costs more than the arithmetic
        buffer = logits.new_empty(CHUNK_ROWS, logits.shape[1], dtype=torch.float32)
        for own in _chunks(len(hidden)):
            chunk = buffer[: own.stop - own.start].copy_(logits[own])
            top, best[own] = chunk.max(dim=-1)
            lse[own] = chunk.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top)
        scores = logits.gather(-1, wanted).float()
        ctx.save_for_backward(hidden, weight, wanted, logits, lse)
        ctx.mark_non_differentiable(best)
        return lse, scores, best

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad_lse, grad_scores, _ = grads
        hidden, weight, wanted, logits, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        buffer = logits.new_empty(CHUNK_ROWS, logits.shape[1], dtype=torch.float32)
        for own in _chunks(len(hidden)):
            # d logsumexp / d logits = softmax
            chunk = buffer[: own.stop - own.start].copy_(logits[own])
            chunk.sub_(lse[own, None]).exp_().mul_(grad_lse[own, None])
            grad_logits[own] = chunk.scatter_add_(-1, wanted[own], grad_scores[own])
        grad_hidden = grad_logits @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_logits.T @ hidden if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None


def _chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_rows))
