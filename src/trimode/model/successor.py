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

__all__ = ["Successor", "TorchDraftHead", "num_candidates"]

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


class TorchDraftHead:
    """What `decoding.interface.DraftHead` asks for, over a model in PyTorch. The products are small ones of single rows, in float32,
    so that a draft does not depend on its company."""

    def __init__(self, successor: Successor, embedding: Tensor, head: Tensor, mask_token_id: int | None) -> None:
        """embedding, head: [V, D]"""
        device = embedding.device
        self._successor = Successor(successor.inner.float().to(device), successor.outer.float().to(device))
        self._embedding, self._head, self._mask = embedding, head, mask_token_id

    def draft(self, hidden: Tensor, logits: Tensor, before: int) -> tuple[list[int], list[float]]:
        tokens, probabilities = self.drafted(hidden, logits, before).tolist()
        return [int(token) for token in tokens], probabilities

    @torch.inference_mode()
    def drafted(self, hidden: Tensor, logits: Tensor, before: int | Tensor) -> Tensor:
        token = before
        found = [torch.empty(2, 0, dtype=torch.float64, device=hidden.device)]
        likely = self._likely(logits)
        for j in range(len(hidden)):
            own = slice(j, j + 1)
            scores = self._scores(hidden[own], logits[own], likely[own], token)
            token = likely[own].gather(-1, scores.gather(-1, likely[own]).argmax(dim=-1, keepdim=True))[0]
            found.append(torch.stack((token.double(), scores[0].double().softmax(dim=-1)[token])))
        return torch.cat(found, dim=1)

    @torch.inference_mode()
    def rescored(self, hidden: Tensor, logits: Tensor, before: int | Tensor) -> Tensor:
        return self._scores(hidden, logits, self._likely(logits), before)

    def _scores(self, hidden: Tensor, logits: Tensor, likely: Tensor, before: int | Tensor) -> Tensor:
        # a number of the host goes along as a constant, for which nothing waits
        token = before if isinstance(before, Tensor) else torch.full((1,), before, device=hidden.device)
        scores = self._successor.scores(hidden.float(), self._embedding[token].float(), self._head[likely].float())
        return logits.float().scatter(-1, likely, scores)

    def _likely(self, logits: Tensor) -> Tensor:
        if self._mask is not None:
            logits = logits.clone()
            logits[:, self._mask] = float("-inf")
        return logits.topk(num_candidates(logits.shape[-1])).indices
