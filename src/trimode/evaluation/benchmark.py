"""The benchmark: every setting on every prompt, interleaved, the same engine's `ar` as baseline.

What drifts (heat, other processes) then meets all settings alike. The warm-up is made and thrown away; a summary refuses its records.
"""

import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from trimode import __version__
from trimode.errors import MeasurementError, SettingError
from trimode.evaluation.metrics import Watch, check_against_stats, quartiles
from trimode.evaluation.prompts import BenchPrompt

__all__ = [
    "Contestant",
    "Measured",
    "Own",
    "Setting",
    "Transformers",
    "as_record",
    "machine",
    "measure",
    "probe_adapter",
    "summarise",
]

WARM_UP_TOKENS = 8
NOISY = 1.25
"""The same request's slowest repetition over its fastest, by median: above it the machine is called too noisy."""
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A mode with knobs of its own."""

    mode: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "trimode"

    @property
    def label(self) -> str:
        parts = [self.mode if self.engine == "trimode" else self.engine, *(f"{k}={v}" for k, v in self.knobs.items())]
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
    energy_joules: float | None
    watching_seconds: float = 0.0


class Contestant(Protocol):
    """An engine that answers prompts under a setting."""

    dtype: str

    def answer(self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int) -> dict[str, Any]:
        """One request: the fields of `Measured` that only the engine can fill."""
        ...


class Own:
    """trimode's engine around a loaded model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dtype = str(model.dtype).removeprefix("torch.")

    def answer(self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int) -> dict[str, Any]:
        asked = list(prompt.prompt) if isinstance(prompt.prompt, tuple) else prompt.prompt
        watch = Watch()
        start = time.perf_counter()
        output = self.model.generate(
            asked, observe=watch, mode=setting.mode, max_new_tokens=max_new_tokens, seed=seed, **setting.knobs
        )
        seconds = time.perf_counter() - start
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
            "revised": watch.revised,
            "seconds": seconds,
            "first_token_seconds": None if watch.first_token_at is None else watch.first_token_at - start,
            "watching_seconds": watch.own_seconds,
        }

    def _expects_adapter(self, mode: str, setting: Setting) -> bool:
        if self.model.adapter is None or setting.knobs.get("draft_lora") is False or mode == "ar":
            return False
        if setting.knobs.get("block_length") == 1:
            return False
        return mode == "self_spec" or self.model.config.adapter_acts_on == "masks"


class Transformers:
    """Hugging Face transformers' `generate` over the same file, prompts, dtype and threads."""

    def __init__(self, model: Any) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise SettingError(
                "The peer transformers is not installed. Run `pip install transformers accelerate`."
            ) from None
        from trimode.checkpoint import open_checkpoint

        path = Path(open_checkpoint(model.name).path)
        folder, gguf_file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=model.dtype)
        self.model, self.peer = model, loaded.eval().to(model.device)
        self.dtype = str(next(self.peer.parameters()).dtype).removeprefix("torch.")

    def answer(self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int) -> dict[str, Any]:
        import torch

        asked = list(prompt.prompt) if isinstance(prompt.prompt, tuple) else prompt.prompt
        start = time.perf_counter()
        prompt_ids = self.model.encode(asked)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        ends = list(self.model.config.eos_token_ids)
        with torch.inference_mode():
            out = self.peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
        new = out[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - start
        return {
            "ran_as": "ar",
            "token_ids": new,
            "finish_reason": "stop" if new and new[-1] in ends else "length",
            "prompt_tokens": len(prompt_ids),
            "tokens": len(new),
            "nfe_prefill": None,
            "nfe_decode": None,
            "rounds": 0,
            "round_tokens": 0,
            "accepted": [],
            "revised": 0,
            "seconds": seconds,
            "first_token_seconds": None,
        }


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
    dtypes = {name: one.dtype for name, one in contestants.items()}
    if len(set(dtypes.values())) > 1:
        raise MeasurementError(
            f"The engines run in different dtypes: {dtypes}. Load them in one, or leave the peer out."
        )
    for setting in settings:
        contestants[setting.engine].answer(setting, prompts[0], min(WARM_UP_TOKENS, max_new_tokens), seed)
    for round_ in range(rounds):
        for number, prompt in enumerate(prompts):
            order = list(settings)
            random.Random(f"{seed} {round_} {number}").shuffle(order)
            for setting in order:
                if done(setting.label, number, round_):
                    continue
                contestant = contestants[setting.engine]
                _forget_peak()
                energy = _energy_uj()
                answer = contestant.answer(setting, prompt, max_new_tokens, seed)
                yield Measured(
                    label=setting.label,
                    engine=setting.engine,
                    mode=setting.mode,
                    settings={**setting.knobs, "max_new_tokens": max_new_tokens, "seed": seed},
                    dtype=contestant.dtype,
                    prompt=number,
                    category=prompt.category,
                    round=round_,
                    peak_memory_bytes=_peak_memory(),
                    energy_joules=_joules(energy, _energy_uj()),
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
    if len(dtypes := {r.dtype for r in records}) > 1:
        raise MeasurementError(f"Measurements in different dtypes cannot be compared: {', '.join(sorted(dtypes))}.")
    baseline = {(r.prompt, r.round): r for r in records if r.label == "ar"}
    labels = list(dict.fromkeys(r.label for r in records))
    labels.sort(key=lambda label: label != "ar")
    return [_row([r for r in records if r.label == label], baseline) for label in labels]


def _row(records: Sequence[Measured], baseline: Mapping[tuple[int, int], Measured]) -> dict[str, Any]:
    first = records[0]
    categories = sorted({r.category for r in records})
    ratios = [
        (r.tokens / r.seconds) / (ar.tokens / ar.seconds)
        for r in records
        if (ar := baseline.get((r.prompt, r.round))) is not None and ar.tokens
    ]
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
        **_figures(records),
        "times_ar": quartiles(ratios),
        "seconds": quartiles([r.seconds for r in records]),
        "first_token_seconds": quartiles(firsts),
        "acceptance_by_position": _acceptance_by_position(records),
        "accepted_histogram": _histogram(records),
        "revised": sum(r.revised for r in records),
        "agreement_with_ar": _agreement(records, baseline),
        "peak_memory_bytes": max((r.peak_memory_bytes for r in records if r.peak_memory_bytes), default=None),
        "energy_joules": quartiles(joules),
        "watching_share": sum(r.watching_seconds for r in records) / sum(r.seconds for r in records),
        "noise": _noise(records),
        "by_category": {c: _figures([r for r in records if r.category == c]) for c in categories},
    }


def _figures(records: Sequence[Measured]) -> dict[str, Any]:
    """Speed and tokens per forward. `total` is the ratio of sums, which short answers cannot distort."""
    decode: list[tuple[int, int]] = [(r.tokens, r.nfe_decode) for r in records if r.nfe_decode]
    whole = [(r.tokens, r.nfe_decode + (r.nfe_prefill or 0)) for r in records if r.nfe_decode is not None]
    return {
        "tokens_per_second": _ratio([(r.tokens, r.seconds) for r in records]),
        "decode_tpf": _ratio(decode),
        "e2e_tpf": _ratio(whole),
        "acceptance_length": _ratio([(r.round_tokens, r.rounds) for r in records if r.rounds]),
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
    return [sum(a > j for a in accepted) / len(accepted) for j in range(max(accepted, default=0))]


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
    """Slowest over fastest repetition of the same request; None where nothing was repeated."""
    by_prompt: dict[int, list[float]] = {}
    for r in records:
        by_prompt.setdefault(r.prompt, []).append(r.seconds)
    spread = quartiles([max(s) / min(s) for s in by_prompt.values() if len(s) > 1])
    return None if spread is None else {**spread, "too_noisy": spread["median"] > NOISY}


def machine() -> dict[str, Any]:
    """The hardware and the versions that figures hold for."""
    import os

    import torch

    versions = {"trimode": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers",):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return {"hardware": {**hardware, "system": platform.platform()}, "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _forget_peak() -> None:
    """Start the peak of memory anew, where the system lets us."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def _peak_memory() -> int | None:
    """Bytes: of the GPU's allocations where there is one, of this process's resident memory otherwise."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return None if peak is None else int(peak.split()[1]) * 1024


def _energy_uj() -> int | None:
    try:
        return int(ENERGY.read_text())
    except (OSError, ValueError):  # the machine does not tell
        return None


def _joules(before: int | None, after: int | None) -> float | None:
    # the counter wraps around now and then: such a request has no figure
    return None if before is None or after is None or after < before else (after - before) / 1e6


def as_record(measured: Measured) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(measured)
