"""The fastest setting within a stated loss of quality, found by measuring, on this machine.

Without a graded task, quality is how likely the answers are under the causal view, token for token, relative to greedy `ar`: the
geometric mean of a token's probability over that of `ar`'s own answers, at most 1. It is blind to a text that is likely and dull, so
the share of answers equal to `ar`'s stands beside it; a task (`tasks`) says more.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trimode.evaluation.benchmark import Measured, Setting, summarise
from trimode.evaluation.evaluate import mean, with_shots
from trimode.evaluation.prompts import BenchPrompt
from trimode.evaluation.tasks.interface import Task

__all__ = ["Likeliness", "Score", "aup", "default_settings", "least_quality", "pick", "task_prompts", "to_points"]

AUP_PENALTY = 3.0
"""alpha of arXiv 2601.07568."""
AUP_FLOOR = 5.0
"""Points of quality, of 100, below the slowest setting's: what lies lower is not counted (same source)."""

Quality = Callable[[Measured], float]
"""What an answer is worth; averages are compared with `ar`'s."""


def default_settings(model: Any) -> list[Setting]:
    """Threshold, block length, policy and kind of self-speculation, around the checkpoint's own block length."""
    own = model.config.block_length
    lengths = sorted({max(2, own // 2), own, 2 * own})
    found: list[tuple[str, dict[str, Any]]] = [("ar", {})]
    found += [("self_spec", {"block_length": length}) for length in lengths]
    found += [("self_spec", {"block_length": own, "threshold": 0.5})]
    found += [
        ("self_spec", {"self_spec_kind": "quadratic", "block_length": length})
        for length in sorted({max(2, own // 2), min(own, 16)})
    ]
    found += [("self_spec", {"self_spec_kind": "lookup", "block_length": own})]
    found += [
        ("diffusion", {"block_length": length, "threshold": threshold})
        for length in lengths[1:]
        for threshold in (0.5, 0.7, 0.9)
    ]
    found += [
        ("diffusion", {"block_length": own, "unmasking": "entropy_bound", "entropy_bound": x}) for x in (0.1, 0.5)
    ]
    found += [("diffusion", {"block_length": own, "unmasking": "margin", "threshold": 0.5})]
    found += [
        ("diffusion", {"block_length": own, "unmasking": "fixed", "max_denoising_steps": max(1, own // 2)}),
    ]
    return [Setting(mode=mode, knobs=knobs) for mode, knobs in found]


def task_prompts(model: Any, task: Task) -> list[BenchPrompt]:
    """A task's examples as prompts of ids, their shots before them."""
    return [
        BenchPrompt(prompt=tuple(model.encode(with_shots(model, example))), category=task.name)
        for example in task.examples
    ]


class Likeliness:
    """Mean log-probability of an answer's tokens under the causal view, in nats."""

    def __init__(self, model: Any, prompts: Sequence[BenchPrompt]) -> None:
        self._model, self._prompts = model, prompts
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, one: Measured) -> float:
        if not one.token_ids:
            return 0.0
        asked = self._model.encode(self._prompts[one.prompt].as_asked())
        whole = self._score((*asked, *one.token_ids)) - self._score(tuple(asked))
        return whole / len(one.token_ids)

    def _score(self, ids: tuple[int, ...]) -> float:
        if len(ids) < 2:
            return 0.0
        if ids not in self._known:
            self._known[ids] = self._model.score(list(ids))
        return self._known[ids]


class Score:
    """The grade of a task."""

    def __init__(self, model: Any, task: Task) -> None:
        self._model, self._task = model, task

    def __call__(self, one: Measured) -> float:
        ends = self._model.config.eos_token_ids
        text = self._model.tokenizer.decode([token for token in one.token_ids if token not in ends])
        return self._task.grade(self._task.examples[one.prompt], text).score


def to_points(records: Sequence[Measured], quality: Quality, *, graded: bool) -> list[dict[str, Any]]:
    """One point a setting: its two speeds, its quality beside `ar`'s, and how often it said the same."""
    worth = {(r.label, r.prompt): quality(r) for r in records if r.round == min(x.round for x in records)}
    base = {prompt: value for (label, prompt), value in worth.items() if label == "ar"}
    points = []
    for row in summarise(records):
        mine = {prompt: value for (label, prompt), value in worth.items() if label == row["label"]}
        lost = [mine[prompt] - base[prompt] for prompt in mine if prompt in base]
        value = statistics.fmean(mine.values()) if graded else math.exp(min(0.0, statistics.fmean(lost)))
        points.append(
            {
                "label": row["label"],
                "mode": row["mode"],
                "settings": {k: v for k, v in row["settings"].items() if k not in ("max_new_tokens", "seed")},
                "quality": value,
                "minus_ar": mean(lost),
                "tokens_per_forward": row["decode_tpf"]["total"] if row["decode_tpf"] else 1.0,
                "tokens_per_second": row["tokens_per_second"]["median"],
                "tokens_per_second_spread": row["tokens_per_second"],
                "agreement_with_ar": row["agreement_with_ar"],
                "acceptance_length": row["acceptance_length"],
                "noise": row["noise"],
            }
        )
    return points


def pick(points: Sequence[Mapping[str, Any]], loss: float) -> Mapping[str, Any]:
    """The fastest point, by the clock, whose quality is at most `loss` (a share) below `ar`'s."""
    least = least_quality(points, loss)
    return max((p for p in points if p["quality"] >= least), key=lambda p: p["tokens_per_second"])


def least_quality(points: Sequence[Mapping[str, Any]], loss: float) -> float:
    """What is still good enough."""
    return next(p["quality"] for p in points if p["label"] == "ar") * (1 - loss)


def aup(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism (arXiv 2601.07568): the area under quality (0 to 100) over tokens per forward, lower quality
    weighed down exponentially. `best`: the highest quality that anybody reaches on the task; the points' own if not given.
    """
    fastest: dict[float, float] = {}
    for speed, value in points:
        fastest[speed] = max(value, fastest.get(speed, 0.0))
    curve = sorted(fastest.items())
    floor = curve[0][1] - AUP_FLOOR
    curve = [(speed, value) for speed, value in curve if value >= floor]
    top = max(value for _, value in curve) if best is None else best

    def weighed(value: float) -> float:
        return value * min(1.0, math.exp(-AUP_PENALTY * (1 - value / top))) if top else 0.0

    area = curve[0][0] * curve[0][1]
    for (slow, before), (fast, after) in pairwise(curve):
        area += (fast - slow) * (weighed(before) + weighed(after)) / 2
    return area
