"""Counts of one request, taken from its forwards and not from what the engine says of itself; the two must agree.

In this field figures mislead: prompt tokens counted as output, warm-up in the time, an adapter silently off. So everything reported is
counted here a second time, and a contradiction is an error instead of a figure.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.decoding.interface import Generation, Outcome, Step
from trimode.errors import MeasurementError

__all__ = ["Watch", "check_against_stats", "quartiles"]


@dataclass(slots=True)
class Watch:
    """The observer of one request: give it as `observe`."""

    clock: Callable[[], float] = time.perf_counter
    tokens: int = 0
    prompt_tokens: int = 0
    nfe_prefill: int = 0
    nfe_decode: int = 0
    rounds: int = 0
    round_tokens: int = 0
    revised: int = 0
    adapted_forwards: int = 0
    """Forwards in which the adapter acted on some input."""
    accepted: list[int] = field(default_factory=list)
    """Of each round: drafts that became part of the answer."""
    longest_draft: int = 0
    """Most drafts that a round verified."""
    first_token_at: float | None = None
    """On the clock."""
    own_seconds: float = 0.0
    """What watching itself took."""

    def __call__(self, g: Generation, step: Step, outcome: Outcome) -> None:
        now = self.clock()
        new = g.num_new - self.tokens
        self.tokens = g.num_new
        self.prompt_tokens = len(g.prompt)
        if step.kind == "prefill":
            self.nfe_prefill += 1
        else:
            self.nfe_decode += 1
        self.revised += outcome.revised
        self.adapted_forwards += bool(step.adapted)
        if outcome.accepted is not None:
            self.rounds += 1
            # a verification's causal inputs are the last known token and the drafts
            self.longest_draft = max(self.longest_draft, step.view.num_causal(len(step.tokens)) - 1)
            self.accepted.append(min(outcome.accepted, new))  # the answer may end inside the draft
        if outcome.accepted is not None or step.kind == "draft":
            self.round_tokens += new
        if new and self.first_token_at is None:
            self.first_token_at = now
        self.own_seconds += self.clock() - now


def check_against_stats(watch: Watch, output: Any, seconds: float, *, expects_adapter: bool) -> None:
    """Raise MeasurementError where the engine's own account of a request contradicts what was watched.

    seconds: of the call, by the tool's clock. expects_adapter: the checkpoint has a draft adapter and this mode should use it.
    """
    stats: Mapping[str, Any] = output.stats.as_dict()
    for name in ("tokens", "prompt_tokens", "nfe_prefill", "nfe_decode", "revised"):
        if stats[name] != getattr(watch, name):
            raise MeasurementError(
                f"The engine reports {name}={stats[name]}, but {getattr(watch, name)} were watched: something else (the prompt, "
                "a warm-up) is counted. No figures are given."
            )
    if len(output.token_ids) != watch.tokens:
        raise MeasurementError(
            f"The answer holds {len(output.token_ids)} ids, but {watch.tokens} became final: prompt tokens may be among them."
        )
    if stats["seconds"] > seconds:
        raise MeasurementError(
            f"The engine reports {stats['seconds']:.3f} s for a call of {seconds:.3f} s: time outside the request is counted."
        )
    if expects_adapter and watch.nfe_decode > 1 and not watch.adapted_forwards:
        raise MeasurementError(
            f"This checkpoint's adapter acted in none of {watch.nfe_prefill + watch.nfe_decode} forwards of mode "
            f"{stats['mode']}. Ask for that with draft_lora=off, or mend the adapter."
        )


def quartiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, and the quartiles as `low` and `high`; None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
