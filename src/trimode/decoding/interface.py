"""The seam that makes the decoders peers.

A generation is final ids, a tentative canvas and a cursor. A decoder answers two questions, `plan` (which forward next?) and `absorb`
(what became final?), and never sees the model: the engine owns every forward. A step asks for predictions by input: *after* a known
input (the causal answer) or *at* a masked one; whether a checkpoint's block rows are shifted is the runner's business. Only where a
shift gives something away for nothing, an exact first token, does a decoder ask *after* masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimode.decoding.reading import Reading, together
from trimode.decoding.settings import Settings
from trimode.model.views import View

__all__ = [
    "Choice",
    "Constraint",
    "Decoder",
    "DraftHead",
    "Generation",
    "OneByOne",
    "Outcome",
    "Predictions",
    "Rows",
    "Step",
    "Tally",
    "TokenLogprob",
    "Traits",
    "sent",
]


def sent(numbers: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device, without waiting for what that has to do yet: out of pageable memory a copy would."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cuda" and tensor.device != device:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What decoders need to know of a checkpoint."""

    mask_token_id: int
    """Stands for 'not known yet' and never wins a choice; -1 where there is none."""
    eos_token_ids: frozenset[int]
    block_length: int
    known_tokens_are_causal: bool = False
    """In a block step, final tokens see causally instead of seeing the block."""
    first_is_exact: bool = False
    """Such a checkpoint whose block rows predict the *next* place: behind the final tokens a block step gives the autoregressive
    prediction itself, and `Step.after` may name masks."""
    adapter_on_draft: str = "none"
    """Inputs of a self-speculation draft that the adapter acts on: "none", "all" or "masks"."""
    adapter_on_denoise: str = "none"
    """The same for diffusion's denoising steps."""
    drafts_adapt: bool = False
    """Each input costs time where this runs: linear drafts are as long as lately paid, unless the request names a block length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass that a decoder asks for, for one generation."""

    kind: str
    """What it is for: prefill, decode, denoise, commit, draft, verify, speculate. For counters and traces."""
    tokens: tuple[int, ...]
    """Inputs, placed after the cached prefix; they start with every final token not yet cached."""
    view: View
    """How these inputs see one another; all of them see the cached prefix. It also gives their positions."""
    after: tuple[int, ...] = ()
    """Inputs whose successor is to be predicted: known ones, and masks where block rows predict the next place."""
    at: tuple[int, ...] = ()
    """Inputs whose own place is to be predicted."""
    adapted: tuple[int, ...] = ()
    """Inputs that the draft adapter acts on."""


@runtime_checkable
class DraftHead(Protocol):
    """Masks are filled all at once and do not know one another's tokens. This chooses again when the token before is known."""

    def draft(self, hidden: Any, logits: Tensor, before: int) -> tuple[list[int], list[float]]:
        """Greedily, for masks in a row behind the token `before`: hidden [n, D] as `Rows` has it, logits [n, V]. Also how probable
        each token is behind those before it."""
        ...

    def drafted(self, hidden: Any, logits: Tensor, before: int | Tensor) -> Tensor:
        """The same, unread: float64 [2, n] where the logits lie; `before` may lie there too ([1]). On a CPU `draft` is quicker: a
        round's tensors take longer there than its lists."""
        ...

    def rescored(self, hidden: Any, logits: Tensor, before: int | Tensor) -> Tensor:
        """One mask's logits behind the token `before`: of hidden [1, D] and logits [1, V] others [1, V]."""
        ...


class Rows:
    """Logits of some inputs, and what the engine found beside them, so that nobody needs to go over a whole vocabulary again.

    A part of them is cut when it is looked at: nobody looks at most of what a step gives, and tensors take their time.
    """

    __slots__ = ("_beside", "_cut", "best", "draft_head")

    def __init__(
        self,
        logits: Tensor,
        best: tuple[int, ...] | None = None,
        logsumexp: Tensor | None = None,
        unread_best: Tensor | None = None,
        best_logits: Tensor | None = None,
        hidden: Any = None,
        draft_head: DraftHead | None = None,
    ) -> None:
        self.best = best
        """The arg-max of each row, the mask token left out, where the host knows it."""
        self.draft_head = draft_head
        """Chooses drafts that know the draft before them, where the checkpoint has such a head."""
        self._beside: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Any]
        self._beside = (logits, logsumexp, unread_best, best_logits, hidden)
        self._cut: slice | None = None

    @property
    def logits(self) -> Tensor:
        """[n, V] in the model's dtype"""
        return self._part(0)

    @property
    def logsumexp(self) -> Tensor | None:
        """[n] where the logits lie"""
        return self._part(1)

    @property
    def unread_best(self) -> Tensor | None:
        """[n] ids: the arg-maxima where the logits lie, if they were found there"""
        return self._part(2)

    @property
    def best_logits(self) -> Tensor | None:
        """[n] Those of `unread_best`."""
        return self._part(3)

    @property
    def hidden(self) -> Any:
        """[n, D] What the draft head wants of these inputs, a tensor or an array as it takes them."""
        return self._part(4)

    def _part(self, index: int) -> Any:
        whole = self._beside[index]
        return whole if self._cut is None or whole is None else whole[self._cut]

    def __len__(self) -> int:
        if self.best is not None:
            return len(self.best)
        return self._beside[0].shape[0] if self._cut is None else self._cut.stop - self._cut.start

    def __getitem__(self, which: slice | list[int]) -> "Rows":
        if isinstance(which, list):
            if which != list(range(which[0] if which else 0, which[-1] + 1 if which else 0)):
                return self._picked(which)
            # a run of rows is looked at where it lies
            which = slice(which[0], which[-1] + 1) if which else slice(0, 0)
        start, stop, step = which.indices(len(self))
        assert step == 1
        if stop - start == len(self):
            return self
        begin = 0 if self._cut is None else self._cut.start
        part = Rows(self._beside[0], None if self.best is None else self.best[which], draft_head=self.draft_head)
        part._beside = self._beside
        part._cut = slice(begin + start, begin + max(start, stop))
        return part

    def picked(self, which: Tensor) -> "Rows":
        """These of them, by an index that lies where the logits do. The host no longer knows the arg-maxima."""
        logits, *beside = (None if x is None else x.index_select(0, which) for x in map(self._part, range(5)))
        assert isinstance(logits, Tensor)
        return Rows(logits, None, *beside, draft_head=self.draft_head)

    def _picked(self, which: list[int]) -> "Rows":
        best = None if self.best is None else tuple(self.best[i] for i in which)

        def part(x: Any) -> Any:
            if x is None:
                return None
            return x[sent(which, x.device)] if isinstance(x, Tensor) else x[which]

        logits, *beside = (part(self._part(i)) for i in range(5))
        return Rows(logits, best, *beside, draft_head=self.draft_head)

    @property
    def lie_on_device(self) -> bool:
        """To look at them is to wait for a device."""
        return self.best is None and self._beside[0].device.type != "cpu"

    def best_probabilities(self) -> Tensor:
        """Of each row's arg-max, as `probabilities` has them."""
        if self.unread_best is not None and self.best_logits is not None and self.logsumexp is not None:
            return (self.best_logits.float() - self.logsumexp.float()).exp().to(self.logits.dtype)
        assert self.best is not None
        return self.probabilities(self.best)

    def probabilities(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """[n] of one token a row, under the untempered distribution with the mask in it, where the logits lie and in their dtype."""
        chosen = self.logits.gather(-1, sent(tokens, self.logits.device, torch.long)[:, None])[:, 0].float()
        total = self.logits.float().logsumexp(dim=-1) if self.logsumexp is None else self.logsumexp.float()
        return (chosen - total).exp().to(self.logits.dtype)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model says of what a step asked, in its order."""

    after: Rows
    """len(step.after) rows"""
    at: Rows
    """len(step.at) rows"""
    num_inputs: int = 0
    """Of the whole forward, others' steps included."""
    seconds: float = 0.0
    """What that forward took."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model itself thought of a token: before temperature, bias, penalties and constraints."""

    token: int
    logprob: float
    """Nats."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with theirs, as many as were asked for."""


class Constraint(Protocol):
    """Says what may follow an answer so far: a grammar, for one. One object serves one generation."""

    def allowed(self, answer: Sequence[int]) -> Tensor:
        """Booleans [V]: what may follow these tokens of the answer, whichever they are. Never all False."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a decoder made of one step's predictions."""

    committed: tuple[int, ...] = ()
    """Tokens that are now final, in order."""
    kept: int = 0
    """How many leading inputs leave their keys and values in the cache; zero for a draft."""
    probabilities: tuple[float, ...] = ()
    """For traces: the confidence of each committed token, where the decoder has one."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each committed token, where the request asks for them."""
    revised: int = 0
    """Filled tokens of the block that this step replaced."""
    accepted: int | None = None
    """Drafts that a verification accepted; None for other steps."""


@dataclass(slots=True)
class Tally:
    """Counts of one generation."""

    nfe_prefill: int = 0
    nfe_decode: int = 0
    rounds: int = 0
    """Verifications."""
    round_tokens: int = 0
    """Tokens emitted by them, the bonus tokens included."""
    revised: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    """Steps by kind."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` chose for a round."""

    kind: str
    """ar, linear, quadratic or lookup."""
    block_length: int = 1

    def __str__(self) -> str:
        return self.kind if self.kind == "ar" else f"{self.kind} {self.block_length}"


@dataclass(slots=True, eq=False)
class Generation:
    """One prompt on its way to an answer. The loop owns `final`, `cached` and `finish_reason`; its decoder owns `canvas` and
    `state`."""

    prompt: tuple[int, ...]
    settings: Settings
    traits: Traits
    random: torch.Generator
    """This request's own random numbers, on the CPU: the same alone or in a batch."""
    decoder: "Decoder"
    constraint: Constraint | None = None
    """What the answer must obey."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of each token of the answer, where the request asks for them."""
    final: list[int] = field(default_factory=list)
    """Prompt and committed tokens."""
    canvas: list[int] = field(default_factory=list)
    """The tentative tokens that follow `final`."""
    cached: int = 0
    """Leading tokens of `final` whose keys and values are in the cache."""
    finish_reason: str | None = None
    state: Any = None
    """Whatever the decoder must remember between steps."""
    index: Any = None
    """What its text holds, for a decoder that looks things up in it."""
    memo: Any = None
    """Whatever who chooses for `auto` remembers of it."""
    lately_accepted: float = 1.5
    """Drafts that a linear verification accepts, a moving mean; before the first one, a guess."""
    choice: Choice | None = None
    """What `auto` does now; None in every other mode."""
    choices: dict[str, int] = field(default_factory=dict)
    """Rounds by what `auto` chose for them."""
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.final = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """The answer so far."""
        return self.final[len(self.prompt) :]

    @property
    def num_new(self) -> int:
        return len(self.final) - len(self.prompt)

    @property
    def num_left(self) -> int:
        """Tokens that may still be committed."""
        return self.settings.max_new_tokens - self.num_new

    @property
    def uncached(self) -> tuple[int, ...]:
        """Final tokens that every next step starts with."""
        return tuple(self.final[self.cached :])

    def ends_with(self, token: int) -> bool:
        """Whether this token ends the text."""
        return not self.settings.ignore_eos and token in self.traits.eos_token_ids


@runtime_checkable
class Decoder(Protocol):
    """A way to decode. One object serves all generations of its kind; what differs lives in the generation."""

    def plan(self, generations: Sequence[Generation]) -> list[Step]:
        """The next forward that each generation needs."""
        ...

    def absorb(
        self, generations: Sequence[Generation], steps: Sequence[Step], predictions: Sequence[Predictions]
    ) -> Reading[list[Outcome]] | list[Outcome]:
        """What each of these forwards made final. May yield tensors that it wants to read: those of all decoders are read at once."""
        ...

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        """Inputs that a step may place after the final tokens: cache positions needed beyond prompt and answer."""
        ...


class OneByOne:
    """A decoder whose generations have nothing to do with one another: it answers for each alone."""

    def plan_one(self, g: Generation) -> Step:
        """The next forward that this generation needs."""
        raise NotImplementedError

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome] | Outcome:
        """What that forward made final."""
        raise NotImplementedError

    def plan(self, generations: Sequence[Generation]) -> list[Step]:
        return [self.plan_one(g) for g in generations]

    def absorb(
        self, generations: Sequence[Generation], steps: Sequence[Step], predictions: Sequence[Predictions]
    ) -> Reading[list[Outcome]]:
        return together(map(self.absorb_one, generations, steps, predictions))
