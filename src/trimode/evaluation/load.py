"""Throughput against concurrency: so many requests in flight at once, through the engine that serves."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimode.engine.engine import Engine, EngineLimits, Entry
from trimode.engine.language_model import num_positions
from trimode.errors import MeasurementError
from trimode.evaluation.benchmark import Setting
from trimode.evaluation.metrics import quartiles
from trimode.evaluation.prompts import BenchPrompt

__all__ = ["Loaded", "measure_load", "summarise_load"]

WAVES = 2
"""Requests for each place: the second wave joins while the first one leaves, as in a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One run with so many requests in flight."""

    label: str
    mode: str
    settings: dict[str, Any]
    concurrency: int
    round: int
    requests: int
    tokens: int
    seconds: float
    forwards: int
    """Of the engine: one serves all who run."""
    request_seconds: list[float]
    """Of each, from its being sent; as soon as one ends the next is sent."""
    first_token_seconds: list[float]
    token_ids: list[list[int]]
    prompts: list[int]


def measure_load(
    model: Any,
    settings: Sequence[Setting],
    prompts: Sequence[BenchPrompt],
    concurrencies: Sequence[int],
    *,
    max_new_tokens: int,
    rounds: int = 1,
    seed: int = 0,
    done: Callable[[str, int, int], bool] = lambda label, concurrency, round_: False,
) -> Iterator[Loaded]:
    """Each run as it is measured, settings and concurrencies in an order drawn from the seed."""
    for round_ in range(rounds):
        order = [(setting, num) for setting in settings for num in concurrencies]
        random.Random(f"load {seed} {round_}").shuffle(order)
        for setting, num in order:
            if not done(setting.label, num, round_):
                yield _run(model, setting, prompts, num, max_new_tokens, seed, round_)


def _run(
    model: Any,
    setting: Setting,
    prompts: Sequence[BenchPrompt],
    num: int,
    max_new_tokens: int,
    seed: int,
    round_: int,
) -> Loaded:
    knobs = {**setting.knobs, "mode": setting.mode, "max_new_tokens": max_new_tokens, "seed": seed}
    chosen = [i % len(prompts) for i in range(num * WAVES)]
    answers = [model.open_answer(prompts[i].as_asked(), knobs) for i in chosen]
    room = max(num_positions(a.generation) for a in answers) + 64
    engine = Engine(model, EngineLimits(max_running=num, max_waiting=len(answers), cache_positions=num * room))
    waiting = iter(answers)

    def send() -> None:
        answer = next(waiting, None)
        if answer is not None:
            answer.start = time.perf_counter()
            engine.submit(Entry(answer, lambda event: send() if event.kind == "finish" else None))

    forwards = 0
    start = time.perf_counter()
    for _ in range(num):
        send()
    while not engine.is_idle:
        engine.tick()
        forwards += 1
    seconds = time.perf_counter() - start
    if failed := [a for a in answers if a.generation.finish_reason not in ("stop", "length")]:
        raise MeasurementError(
            f"{len(failed)} of {len(answers)} requests ended with {failed[0].generation.finish_reason!r}. No figures are given."
        )
    return Loaded(
        label=setting.label,
        mode=setting.mode,
        settings=dict(setting.knobs),
        concurrency=num,
        round=round_,
        requests=len(answers),
        tokens=sum(a.generation.num_new for a in answers),
        seconds=seconds,
        forwards=forwards,
        request_seconds=[a.seconds or 0.0 for a in answers],
        first_token_seconds=[a.first_token_s or 0.0 for a in answers],
        token_ids=[a.generation.new_tokens for a in answers],
        prompts=chosen,
    )


def summarise_load(runs: Sequence[Loaded], alone: dict[tuple[str, int], list[int]]) -> list[dict[str, Any]]:
    """A row for each setting and concurrency. `alone`: ids by (label, prompt) of the same requests measured one by one."""
    rows = []
    keys = sorted({(r.label, r.concurrency) for r in runs})
    for label, num in keys:
        mine = [r for r in runs if (r.label, r.concurrency) == (label, num)]
        pairs = [
            (ids, alone[label, prompt])
            for r in mine
            for ids, prompt in zip(r.token_ids, r.prompts, strict=True)
            if (label, prompt) in alone
        ]
        rows.append(
            {
                "label": label,
                "mode": mine[0].mode,
                "settings": mine[0].settings,
                "concurrency": num,
                "requests": sum(r.requests for r in mine),
                "tokens_per_second": quartiles([r.tokens / r.seconds for r in mine]),
                "tokens_per_forward": sum(r.tokens for r in mine) / sum(r.forwards for r in mine),
                "request_seconds": quartiles([s for r in mine for s in r.request_seconds]),
                "first_token_seconds": quartiles([s for r in mine for s in r.first_token_seconds]),
                "equal_to_alone": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
            }
        )
    return rows
