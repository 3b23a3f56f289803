"""Asks a model the examples of tasks in several settings, grades every answer, and keeps every one with its grade and its cost.

Settings take turns example by example, so that what drifts meets all alike, and each is compared with `ar` on the same examples: a
difference of pairs has a far smaller error than a difference of two shares.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.errors import ContextLengthError, SettingError
from trimode.evaluation.speed_of_light import ratio
from trimode.evaluation.tasks.interface import Example, Task

__all__ = ["EvalSetting", "evaluate", "mean", "summarise_eval", "with_shots"]

Sample = dict[str, Any]
"""One graded answer: task, setting, id, prompt, answer, score, parts, note, finish_reason, cost. Plain values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSetting:
    """A mode with knobs of its own."""

    mode: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ":".join([self.mode, *(f"{k}={v}" for k, v in self.knobs.items())])


def evaluate(
    model: Any,
    tasks: Sequence[Task],
    settings: Sequence[EvalSetting],
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    done: Callable[[str, str, str], bool] = lambda task, setting, id: False,
) -> Iterator[Sample]:
    """Each sample as it is graded. max_new_tokens: the task's own if None. `done(task, setting label, id)`: not asked again."""
    for task in tasks:
        for example in task.examples:
            for setting in settings:
                if not done(task.name, setting.label, example.id):
                    yield _ask(model, task, example, setting, max_new_tokens or task.max_new_tokens, seed)


def _ask(model: Any, task: Task, example: Example, setting: EvalSetting, most: int, seed: int) -> Sample:
    about = {
        "task": task.name,
        "setting": setting.label,
        "id": example.id,
        "prompt": example.prompt,
        "shots": example.shots,
    }
    try:
        asked = with_shots(model, example)
        out = model.generate(asked, mode=setting.mode, max_new_tokens=most, seed=seed, **setting.knobs)
    except ContextLengthError as error:
        # one example that does not fit is a wrong answer, not the end of the run
        grade = {"score": 0.0, "parts": {}, "note": str(error)}
        return {**about, "answer": "", **grade, "finish_reason": "too long", "cost": None}
    grade = task.grade(example, out.text)
    return {
        **about,
        "answer": out.text,
        "score": grade.score,
        "parts": dict(grade.parts),
        "note": grade.note,
        "finish_reason": out.finish_reason,
        "cost": out.stats.as_dict(),
    }


def with_shots(model: Any, example: Example) -> Any:
    """The prompt behind its shots: as turns of a chat, or one text for a checkpoint without a chat template."""
    if model.tokenizer is None:
        raise SettingError(f"{model.name} has no tokenizer, and tasks ask in text. Evaluate a checkpoint with one.")
    if model.tokenizer.chat_template is None:
        return "\n\n".join([*(f"{asked}\n{answer}" for asked, answer in example.shots), f"{example.prompt}\n"])
    turns = [turn for shot in example.shots for turn in zip(("user", "assistant"), shot, strict=True)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", example.prompt)]]


def summarise_eval(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and setting, each figure with its standard error, `ar` first."""
    rows = []
    for task in dict.fromkeys(s["task"] for s in samples):
        of_task = [s for s in samples if s["task"] == task]
        labels = sorted(dict.fromkeys(s["setting"] for s in of_task), key=lambda label: label != "ar")
        baseline = {s["id"]: s for s in of_task if s["setting"] == "ar"}
        rows += [_row(task, label, [s for s in of_task if s["setting"] == label], baseline) for label in labels]
    return rows


def _row(
    task: str, label: str, samples: Sequence[Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    costs = [{"prompt": s["id"], **s["cost"]} for s in samples if s["cost"] is not None]
    pairs = [(s, baseline[s["id"]]) for s in samples if s["id"] in baseline]
    parts = list(dict.fromkeys(name for s in samples for name in s["parts"]))
    return {
        "task": task,
        "setting": label,
        "ran_as": costs[0]["mode"] if costs else label,
        "n": len(samples),
        "score": mean([s["score"] for s in samples]),
        "parts": {name: mean([s["parts"].get(name, 0.0) for s in samples]) for name in parts},
        "minus_ar": mean([s["score"] - ar["score"] for s, ar in pairs]) if label != "ar" and pairs else None,
        "same_answer_as_ar": mean([float(s["answer"] == ar["answer"]) for s, ar in pairs]) if pairs else None,
        "cut_short": mean([float(s["finish_reason"] in ("length", "too long")) for s in samples]),
        "tokens": mean([c["tokens"] for c in costs] or [0.0]),
        "decode_tpf": ratio(costs, "tokens", "nfe_decode") if any(c["nfe_decode"] for c in costs) else None,
        "tokens_per_second": ratio(costs, "tokens", "seconds") if costs else {"value": 0.0, "standard_error": None},
    }


def mean(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its standard error (None for a single value)."""
    n = len(values)
    center = math.fsum(values) / n
    error = None
    if n > 1:
        error = math.sqrt(math.fsum((v - center) ** 2 for v in values) / (n - 1) / n)
    return {"value": center, "standard_error": error}
