"""What runs a forward: one contract, two engines.

`TorchForward` (here) runs every family, dtype and device, and is the oracle; `model.native.NativeForward` runs on the CPU in C++. Each
makes and owns its cache's memory. Whoever plans forwards cannot tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimode.model.attention import CachedAttention, KernelName, Span
from trimode.model.cache import KeyValueCache
from trimode.model.config import ModelConfig
from trimode.model.lora import Lora
from trimode.model.successor import Successor, num_candidates
from trimode.model.transformer import Transformer

__all__ = ["Answers", "Cache", "Forward", "Inputs", "Scores", "TorchForward"]


class Answers(NamedTuple):
    """The output head over some hidden states, and what was found beside."""

    logits: Tensor
    """[n, V] in the model's dtype"""
    best: tuple[int, ...] | None = None
    """The arg-max of each row, the mask token left out; None where nobody looked."""
    logsumexp: Tensor | None = None
    """[n] float32; None where nobody looked."""
    hidden: Tensor | None = None
    """[n, D] The hidden states themselves, where a draft head may want them."""
    draft_head: Any = None
    """Chooses drafts one behind the other (`draft`, `rescored`); None where the adapter has no successor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All rows of a forward, packed behind one another."""

    tokens: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    """Which inputs are one row's, and where in the cache they go."""
    adapted: Sequence[int] = ()
    """Inputs that the adapter acts on."""
    asked: Sequence[int] = ()
    """Inputs whose logits are wanted, in this order."""


@runtime_checkable
class Cache(Protocol):
    """Keys and values in slots, each of its own length. See `KeyValueCache`."""

    starts: list[int]
    lengths: list[int]

    def place(self, slot: int, start: int, length: int) -> None: ...
    def copy(self, source: int, target: int, num_positions: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...


@runtime_checkable
class Scores(Protocol):
    """What a forward found about the inputs that were asked for."""

    def answers(self, start: int, stop: int) -> "Answers":
        """Of these of them. Valid until the next forward."""
        ...

    def logits(self, start: int, stop: int) -> Tensor:
        """The logits alone."""
        ...


@runtime_checkable
class Forward(Protocol):
    """Runs forwards of one model."""

    config: ModelConfig
    dtype: torch.dtype
    """Of the logits."""
    device: torch.device
    precision: str
    """What the weights are held in."""

    def make_cache(self, lengths: Sequence[int]) -> Cache:
        """Room for one generation a slot."""
        ...

    def describe(self) -> str:
        """What runs, in a few words: whatever a forward's cost hangs on beside the model and the machine."""
        ...

    def __call__(self, inputs: Inputs, cache: Cache) -> Scores:
        """One forward: keys and values go into the cache, behind each row's cursor."""
        ...


class TorchForward:
    """A `Transformer` over a `KeyValueCache`."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        lora: Lora | None = None,
        kernel: KernelName = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transformer = transformer
        self.config = transformer.config
        self._lora = lora
        self._kernel: KernelName = kernel
        self.dtype = dtype
        self.device = torch.device(device)
        self.precision = str(dtype).removeprefix("torch.")
        self._draft_head = (
            None if lora is None or lora.successor is None else TorchDraftHead(transformer, lora.successor)
        )

    def make_cache(self, lengths: Sequence[int]) -> KeyValueCache:
        return KeyValueCache(self.config, lengths, dtype=self.dtype, device=self.device)

    def describe(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"torch {self.precision}, {self._kernel}{threads}"

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, cache: Cache) -> "TorchScores":
        assert isinstance(cache, KeyValueCache)
        device = self.device
        hidden = self.transformer(
            torch.tensor(inputs.tokens, device=device),
            torch.tensor(inputs.positions, device=device),
            CachedAttention(inputs.spans, cache, self._kernel, device),
            lora=self._lora,
            lora_rows=None if self._lora is None else torch.tensor(inputs.adapted, dtype=torch.long, device=device),
        )
        asked = torch.tensor(inputs.asked, dtype=torch.long, device=device)
        return TorchScores(self.transformer, hidden[asked], self._draft_head)


class TorchScores:
    """Hidden states, and the head that turns them into logits."""

    def __init__(self, transformer: Transformer, hidden: Tensor, draft_head: "TorchDraftHead | None" = None) -> None:
        self._transformer = transformer
        self._hidden = hidden
        self._draft_head = draft_head

    def answers(self, start: int, stop: int) -> Answers:
        head = self._draft_head
        return Answers(
            self.logits(start, stop), hidden=None if head is None else self._hidden[start:stop], draft_head=head
        )

    @torch.inference_mode()
    def logits(self, start: int, stop: int) -> Tensor:
        return self._transformer.logits(self._hidden[start:stop])


class TorchDraftHead:
    """What `decoding.interface.DraftHead` asks for. Its products are small ones of single rows, in float32, so that a draft does not
    depend on its company."""

    def __init__(self, transformer: Transformer, successor: Successor) -> None:
        config = transformer.config
        self._successor = Successor(successor.inner.float(), successor.outer.float())
        self._embedding = transformer.embedding.weight
        self._head = self._embedding if config.tied_head else transformer.head.dense_weight()
        self._mask = config.mask_token_id

    @torch.inference_mode()
    def draft(self, hidden: Tensor, logits: Tensor, before: int) -> tuple[list[int], list[float]]:
        likely = self._likely(logits)
        tokens, probabilities = [], []
        for j in range(len(hidden)):
            own = slice(j, j + 1)
            scores = self._rescored(hidden[own], logits[own], likely[own], before)
            best = likely[own].gather(-1, scores.gather(-1, likely[own]).argmax(dim=-1, keepdim=True))
            before = int(best)
            tokens.append(before)
            probabilities.append(float(scores.log_softmax(dim=-1).gather(-1, best).exp()))
        return tokens, probabilities

    @torch.inference_mode()
    def rescored(self, hidden: Tensor, logits: Tensor, before: int) -> Tensor:
        return self._rescored(hidden, logits, self._likely(logits), before)

    def _rescored(self, hidden: Tensor, logits: Tensor, likely: Tensor, before: int) -> Tensor:
        token = torch.tensor([before], device=hidden.device)
        scores = self._successor.scores(hidden.float(), self._embed(token), self._rows(likely))
        return logits.float().scatter(-1, likely, scores)

    def _likely(self, logits: Tensor) -> Tensor:
        return self._without_mask(logits).topk(num_candidates(logits.shape[-1])).indices

    def _without_mask(self, logits: Tensor) -> Tensor:
        if self._mask is None:
            return logits
        return logits.index_fill(-1, torch.tensor(self._mask, device=logits.device), float("-inf"))

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens].float()

    def _rows(self, tokens: Tensor) -> Tensor:
        return self._head[tokens].float()
