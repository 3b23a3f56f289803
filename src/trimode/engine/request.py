"""What goes into the engine and what comes out: requests, answers, their costs, and stream events."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimode.decoding.interface import Generation, TokenLogprob

__all__ = ["Generated", "Infilled", "Request", "Stats", "StreamEvent", "make_stats"]


class Request:
    """A prompt with knobs of its own, for batches that mix modes: `model.generate([Request(a, mode="ar"), Request(b, seed=1)])`."""

    __slots__ = ("knobs", "prompt")

    def __init__(self, prompt: Any, **knobs: Any) -> None:
        self.prompt = prompt
        self.knobs: Mapping[str, Any] = knobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an answer cost. Prompt tokens never count as output."""

    mode: str
    """The decoder that ran: ar, diffusion or self_spec."""
    prompt_tokens: int
    tokens: int
    """New tokens, the end-of-text token included."""
    nfe_prefill: int
    """Forwards that read the prompt."""
    nfe_decode: int
    """All other forwards: denoise, commit, draft, verify."""
    decode_tpf: float
    """tokens / nfe_decode."""
    e2e_tpf: float
    """tokens / (nfe_prefill + nfe_decode)."""
    acceptance_length: float | None
    """self_spec: tokens emitted per round, the bonus token included."""
    revised: int
    """diffusion: filled tokens that were replaced before their block was committed."""
    seconds: float
    """From the call to the last token; prompts of one batch share it."""
    first_token_seconds: float
    """From the call to the first committed token."""
    tokens_per_second: float
    """tokens / seconds, prefill included."""
    self_spec_kind: str | None = None
    """self_spec: linear, quadratic or lookup; None where `auto` chose, which `choices` tells."""
    choices: dict[str, int] | None = None
    """auto: rounds by what was chosen for them, such as "ar" or "linear 5"."""
    notice: str | None = None
    """What one should know about this checkpoint in this mode."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """An answer."""

    text: str
    """Without the end-of-text token and the stop string; empty for checkpoints without a tokenizer."""
    token_ids: list[int]
    """New ids, with the end-of-text token if the model produced it."""
    finish_reason: str
    """`stop`: the text ended. `length`: max_new_tokens were made."""
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    """Of each new id, where `logprobs` asks for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Infilled:
    """A text whose masked spans were filled."""

    text: str
    """The whole text."""
    spans: list[str]
    """What was filled in, in order."""
    token_ids: list[int]
    """Ids of the whole text."""
    stats: Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """Something that happened to a streamed answer. The texts of all events, joined, are the answer's text."""

    kind: str
    """`text`: more of it is final. `canvas`: the tentative block changed. `finish`: the last event."""
    text: str = ""
    """Newly final text; never taken back."""
    token_ids: tuple[int, ...] = ()
    """Newly final ids."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Theirs, where the request asks for them."""
    canvas: list[str | None] | None = None
    """The tentative block, None where still masked."""
    output: Generated | None = None
    """With `finish`: the whole answer."""


def make_stats(
    generation: Generation,
    mode: str,
    *,
    seconds: float,
    first: float | None,
    notice: str | None,
    spans: Sequence[range] | None = None,
) -> Stats:
    """A finished (or stopped) generation's costs. spans: of a text to fill in; what was given never counts as output."""
    tally = generation.tally
    tokens, prompt_tokens = generation.num_new, len(generation.prompt)
    if spans is not None:
        num_final = len(generation.final)
        tokens = sum(max(0, min(num_final, span.stop) - span.start) for span in spans)
        prompt_tokens += generation.settings.max_new_tokens - sum(map(len, spans))
    return Stats(
        mode=mode,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        nfe_prefill=tally.nfe_prefill,
        nfe_decode=tally.nfe_decode,
        decode_tpf=tokens / max(tally.nfe_decode, 1),
        e2e_tpf=tokens / max(tally.nfe_prefill + tally.nfe_decode, 1),
        acceptance_length=tally.round_tokens / tally.rounds if tally.rounds else None,
        revised=tally.revised,
        seconds=seconds,
        first_token_seconds=seconds if first is None else first,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        self_spec_kind=generation.settings.self_spec_kind if mode == "self_spec" and not generation.choices else None,
        choices=dict(generation.choices) or None,
        notice=notice,
    )
