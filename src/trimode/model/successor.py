"""Drafts that know the draft before them.

Masks are filled all at once, so that a draft's second token is guessed without its first. A successor corrects that at the price of two
small products a token: from a mask's hidden state and the embedding of the token chosen before it comes a change of the hidden
state, and the mask's likeliest tokens are scored again with it. The idea is that of sequentially dependent draft heads (arXiv
2402.05109), on top of masks that have already seen one another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Successor", "num_candidates"]

CANDIDATES = 32
"""Tokens of a row that are scored again: its likeliest ones."""


def num_candidates(vocab_size: int) -> int:
    """Tokens of a row that are scored again; the mask is never one of them."""
    return min(CANDIDATES, vocab_size - 1)


@dataclass(frozen=True, slots=True)
class Successor:
    """hidden + outer silu(inner [hidden | embedding of the token before]), both normalised first."""

    inner: Tensor
    """[R, 2 D]"""
    outer: Tensor
    """[D, R]"""

    def changed(self, hidden: Float[Tensor, "*n D"], before: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Final hidden states of masks, as they are where these embeddings belong to the tokens before them."""
        width = hidden.shape[-1:]
        both = torch.cat((F.rms_norm(hidden, width), F.rms_norm(before, width)), dim=-1)
        return hidden + F.silu(both @ self.inner.T) @ self.outer.T

    def scores(
        self, hidden: Float[Tensor, "*n D"], before: Float[Tensor, "*n D"], candidates: Float[Tensor, "*n k D"]
    ) -> Float[Tensor, "*n k"]:
        """Scores of tokens, given as rows of the head, at masks behind these tokens, given as embeddings."""
        return (candidates @ self.changed(hidden, before)[..., None])[..., 0]

    def draft(
        self,
        hidden: Float[Tensor, "n m D"],
        logits: Float[Tensor, "n m V"],
        before: Int[Tensor, " n"],
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
    ) -> Int[Tensor, "n m"]:
        """The likeliest tokens of n blocks of m masks, each knowing the one before it; `before` are those before the blocks. The
        mask's own logits must be -inf.

        embed, head: ids to rows of the embedding and of the output head.
        """
        likely = logits.topk(num_candidates(logits.shape[-1]), dim=-1).indices
        drafts = []
        for j in range(hidden.shape[1]):
            scores = self.scores(hidden[:, j], embed(before), head(likely[:, j]))
            before = likely[:, j].gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]
            drafts.append(before)
        return torch.stack(drafts, dim=1)
