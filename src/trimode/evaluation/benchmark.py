"""The benchmark: every setting on every prompt, interleaved, the same engine's `ar` as baseline.

What drifts (heat, other processes) then meets all settings alike. The warm-up is made and thrown away; a summary refuses its records.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimode.errors import MeasurementError
from trimode.evaluation.meters import Meters
from trimode.evaluation.metrics import Watch, check_against_stats, quartiles
from trimode.evaluation.prompts import BenchPrompt

__all__ = [
    "Contestant",
    "Measured",
    "Own",
    "Setting",
    "compare",
    "measure",
    "probe_adapter",
    "summarise",
]

WARM_UP_TOKENS = 8
NOISY = 1.25
"""The same request's slowest repetition over its fastest, by median: above it the machine is called too noisy."""
DEAREST_WATCHING = 0.02
"""Share of the time that the tool itself may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A mode with knobs of its own."""

    mode: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "trimode"
    dtype: str | None = None
    """The numbers that the engine runs in, where they are not those of the baseline: then the label says so."""

    @property
    def label(self) -> str:
        name = self.mode if self.engine == "trimode" else self.engine
        parts = [name if self.dtype is None else f"{name} {self.dtype}", *(f"{k}={v}" for k, v in self.knobs.items())]
        return ":".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One request, measured."""

    label: str
    engine: str
    mode: str
    ran_as: str
    """The mode that `auto` stood for."""
    settings: dict[str, Any]
    dtype: str
    prompt: int
    """Its number, from 0."""
    category: str
    round: int
    """Repetition, from 0; negative is warm-up."""
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    tokens: int
    nfe_prefill: int | None
    nfe_decode: int | None
    rounds: int
    round_tokens: int
    accepted: list[int]
    revised: int
    seconds: float
    first_token_seconds: float | None
    peak_memory_bytes: int | None
    """The engine's weights and what this request took on top, without the interpreter and its libraries."""
    energy_joules: float | None
    longest_draft: int = 0
    watching_seconds: float = 0.0
    """What the tool itself took of the time."""
    trace_request: int | None = None
    """Its number in the trace, where one was written."""


class Contestant(Protocol):
    """An engine that answers prompts under a setting."""

    dtype: str
    """The numbers that it runs in."""
    resident_bytes: int | None
    """Memory that it takes before any request: its weights. None where nobody knows."""

    def answer(
        self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int, *, warm_up: bool = False
    ) -> dict[str, Any]:
        """One request: the fields of `Measured` that only the engine can fill. warm_up: it will be thrown away."""
        ...


class Own:
    """trimode's engine around a loaded model."""

    def __init__(self, model: Any, *, resident_bytes: int | None = None, trace: Any = None) -> None:
        """trace: a `decoding.trace.Trace` that is to see every forward too."""
        self.model, self.trace = model, trace
        self.dtype: str = model.precision
        self.resident_bytes = resident_bytes

    def answer(
        self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int, *, warm_up: bool = False
    ) -> dict[str, Any]:
        watch = Watch()
        observe: Any = watch
        traced, trace = 0.0, None if warm_up else self.trace
        if trace is not None:
            trace.also, observe, traced = watch, trace, trace.own_seconds
        start = time.perf_counter()
        output = self.model.generate(
            prompt.as_asked(),
            observe=observe,
            mode=setting.mode,
            max_new_tokens=max_new_tokens,
            seed=seed,
            **setting.knobs,
        )
        seconds = time.perf_counter() - start
        if trace is not None:
            watch.own_seconds += trace.own_seconds - traced
        check_against_stats(watch, output, seconds, expects_adapter=self._expects_adapter(output.stats.mode, setting))
        return {
            "ran_as": output.stats.mode,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            "prompt_tokens": watch.prompt_tokens,
            "tokens": watch.tokens,
            "nfe_prefill": watch.nfe_prefill,
            "nfe_decode": watch.nfe_decode,
            "rounds": watch.rounds,
            "round_tokens": watch.round_tokens,
            "accepted": watch.accepted,
            "longest_draft": watch.longest_draft,
            "revised": watch.revised,
            "seconds": seconds,
            "first_token_seconds": None if watch.first_token_at is None else watch.first_token_at - start,
            "watching_seconds": watch.own_seconds,
            "trace_request": None if trace is None else trace.num_requests - 1,
        }

    def _expects_adapter(self, mode: str, setting: Setting) -> bool:
        if self.model.adapter is None or setting.knobs.get("draft_lora") is False or mode == "ar":
            return False
        if setting.mode == "auto":  # it may find that no draft pays, round after round
            return False
        if setting.knobs.get("block_length") == 1 or setting.knobs.get("self_spec_kind") == "lookup":
            return False
        return mode == "self_spec" or self.model.config.adapter_acts_on == "masks"


def measure(
    contestants: Mapping[str, Contestant],
    settings: Sequence[Setting],
    prompts: Sequence[BenchPrompt],
    *,
    max_new_tokens: int,
    rounds: int = 1,
    seed: int = 0,
    done: Callable[[str, int, int], bool] = lambda label, prompt, round_: False,
) -> Iterator[Measured]:
    """Each request as it is measured. `done(label, prompt, round)`: measured before, so not again.

    For each prompt all settings run one after the other, in an order drawn from the seed. Raises MeasurementError.
    """
    own = contestants["trimode"].dtype
    for setting in settings:
        if contestants[setting.engine].dtype != (setting.dtype or own):
            raise MeasurementError(
                f"The engines run in different dtypes: {setting.label} in {contestants[setting.engine].dtype}, the baseline in "
                f"{own}. Load them in one, or name the dtype in the setting so that its row says so."
            )
    meters = Meters()
    for setting in settings:
        contestants[setting.engine].answer(setting, prompts[0], min(WARM_UP_TOKENS, max_new_tokens), seed, warm_up=True)
    for round_ in range(rounds):
        for number, prompt in enumerate(prompts):
            order = list(settings)
            random.Random(f"{seed} {round_} {number}").shuffle(order)
            for setting in order:
                if done(setting.label, number, round_):
                    continue
                contestant = contestants[setting.engine]
                meters.begin()
                answer = contestant.answer(setting, prompt, max_new_tokens, seed)
                rise, joules = meters.end()
                resident = contestant.resident_bytes
                yield Measured(
                    label=setting.label,
                    engine=setting.engine,
                    mode=setting.mode,
                    settings={**setting.knobs, "max_new_tokens": max_new_tokens, "seed": seed},
                    dtype=contestant.dtype,
                    prompt=number,
                    category=prompt.category,
                    round=round_,
                    peak_memory_bytes=None if rise is None or resident is None else resident + rise,
                    energy_joules=joules,
                    **answer,
                )


def probe_adapter(model: Any) -> None:
    """Raise MeasurementError if the draft adapter is loaded and changes nothing."""
    if model.adapter is None or model.config.mask_token_id is None:
        return
    ids = [min(5, model.config.vocab_size - 1)] + [model.config.mask_token_id] * 3
    off, on = (model.logits(ids, view="block", prefix=1, draft_lora=use) for use in (False, True))
    if bool((off == on).all()):
        raise MeasurementError(
            f"The draft adapter of {model.name} changes no logit: it is silently off. Mend it first."
        )


def summarise(records: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row a setting, against the `ar` of the same engine on the same prompts. Raises MeasurementError."""
    if any(r.round < 0 for r in records):
        raise MeasurementError("A warm-up is among the measurements. Leave it out.")
    if not records:
        return []
    own = next((r.dtype for r in records if r.label == "ar"), records[0].dtype)
    for r in records:
        if r.dtype != own and (r.engine == "trimode" or r.dtype not in r.label):
            raise MeasurementError(
                f"Measurements in different dtypes cannot be compared: {r.label} in {r.dtype}, the baseline in {own}."
            )
    baseline = {(r.prompt, r.round): r for r in records if r.label == "ar"}
    engines = {r.label: r.engine for r in records}
    labels = sorted(engines, key=lambda label: (label != "ar", engines[label] != "trimode", label))
    return [_row([r for r in records if r.label == label], baseline) for label in labels]


def _row(records: Sequence[Measured], baseline: Mapping[tuple[int, int], Measured]) -> dict[str, Any]:
    first = records[0]
    categories = sorted({r.category for r in records})
    firsts = [r.first_token_seconds for r in records if r.first_token_seconds is not None]
    joules = [r.energy_joules for r in records if r.energy_joules is not None]
    return {
        "label": first.label,
        "engine": first.engine,
        "mode": first.mode,
        "ran_as": first.ran_as,
        "settings": first.settings,
        "dtype": first.dtype,
        "requests": len(records),
        **_figures(records, baseline),
        "seconds": quartiles([r.seconds for r in records]),
        "first_token_seconds": quartiles(firsts),
        "acceptance_by_position": _acceptance_by_position(records),
        "accepted_histogram": _histogram(records),
        "revised": sum(r.revised for r in records),
        "peak_memory_bytes": max((r.peak_memory_bytes for r in records if r.peak_memory_bytes), default=None),
        "energy_joules": quartiles(joules),
        "joules_per_token": sum(joules) / sum(r.tokens for r in records) if len(joules) == len(records) else None,
        "watching_share": (share := sum(r.watching_seconds for r in records) / sum(r.seconds for r in records)),
        "watching_too_dear": share > DEAREST_WATCHING,
        "noise": _noise(records),
        "by_category": {c: _figures([r for r in records if r.category == c], baseline) for c in categories},
    }


def _figures(records: Sequence[Measured], baseline: Mapping[tuple[int, int], Measured]) -> dict[str, Any]:
    """Speed and tokens per forward. `total` is the ratio of sums, which short answers cannot distort."""
    decode: list[tuple[int, int]] = [(r.tokens, r.nfe_decode) for r in records if r.nfe_decode]
    ratios = [
        (r.tokens / r.seconds) / (ar.tokens / ar.seconds)
        for r in records
        if (ar := baseline.get((r.prompt, r.round))) is not None and ar.tokens
    ]
    whole = [(r.tokens, r.nfe_decode + (r.nfe_prefill or 0)) for r in records if r.nfe_decode is not None]
    return {
        "tokens_per_second": _ratio([(r.tokens, r.seconds) for r in records]),
        "decode_tpf": _ratio(decode),
        "e2e_tpf": _ratio(whole),
        "acceptance_length": _ratio([(r.round_tokens, r.rounds) for r in records if r.rounds]),
        "agreement_with_ar": _agreement(records, baseline),
        "times_ar": quartiles(ratios),
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    spread = quartiles([a / b for a, b in pairs if b])
    return None if spread is None else {"total": sum(a for a, _ in pairs) / sum(b for _, b in pairs), **spread}


def _histogram(records: Sequence[Measured]) -> dict[str, int]:
    """Rounds by how many drafts they accepted."""
    counts: dict[int, int] = {}
    for r in records:
        for accepted in r.accepted:
            counts[accepted] = counts.get(accepted, 0) + 1
    return {str(k): counts[k] for k in sorted(counts)}


def _acceptance_by_position(records: Sequence[Measured]) -> list[float]:
    """Share of rounds that accepted the draft at each position, the first one behind the known token first."""
    accepted = [a for r in records for a in r.accepted]
    longest = max((r.longest_draft for r in records), default=0) if accepted else 0
    return [sum(a > j for a in accepted) / len(accepted) for j in range(longest)]


def _agreement(records: Sequence[Measured], baseline: Mapping[tuple[int, int], Measured]) -> dict[str, Any] | None:
    """Share of answers equal to greedy `ar`'s, and where the others first differ."""
    pairs = [(r.token_ids, ar.token_ids) for r in records if (ar := baseline.get((r.prompt, r.round))) is not None]
    if not pairs:
        return None
    differ = [_first_difference(a, b) for a, b in pairs if a != b]
    share = 1 - len(differ) / len(pairs)
    error = (share * (1 - share) / len(pairs)) ** 0.5
    return {"share_equal": share, "standard_error": error, "first_difference": quartiles(differ)}


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _noise(records: Sequence[Measured]) -> dict[str, Any] | None:
    """Slowest over fastest repetition of the same request, and each round's median speed; None where nothing was repeated.

    Rounds are runs of the same command. Too noisy: repetitions differ much, or one round's median lies outside of the whole's
    quartiles, as a second run's then might.
    """
    by_prompt: dict[int, list[float]] = {}
    by_round: dict[int, list[float]] = {}
    for r in records:
        by_prompt.setdefault(r.prompt, []).append(r.seconds)
        by_round.setdefault(r.round, []).append(r.tokens / r.seconds)
    spread = quartiles([max(s) / min(s) for s in by_prompt.values() if len(s) > 1])
    whole = quartiles([speed for speeds in by_round.values() for speed in speeds])
    if spread is None or whole is None:
        return None
    rounds = [statistics.median(speeds) for _, speeds in sorted(by_round.items())]
    agree = all(whole["low"] <= median <= whole["high"] for median in rounds)
    too_noisy = spread["median"] > NOISY or (len(by_prompt) > 1 and not agree)
    return {**spread, "rounds_tokens_per_second": rounds, "too_noisy": too_noisy}


def compare(rows: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether each setting's median speed lies within the spread that an earlier run of it stated."""
    before = {row["label"]: row["tokens_per_second"] for row in earlier}
    return [
        {
            "label": row["label"],
            "median": row["tokens_per_second"]["median"],
            "earlier": before[row["label"]],
            "within": before[row["label"]]["low"] <= row["tokens_per_second"]["median"] <= before[row["label"]]["high"],
        }
        for row in rows
        if row["label"] in before
    ]
