"""Where a benchmark's run lies: its plan, every request as soon as it is measured, and the report made of them.

A run that was stopped goes on where it was; one with other settings, versions or prompts is never mixed into it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimode.errors import DataError
from trimode.evaluation.benchmark import Measured
from trimode.evaluation.load import Loaded

__all__ = ["RunFolder"]

PLAN, REQUESTS, LOADS, REPORT = "plan.json", "requests.jsonl", "load.jsonl", "bench.json"


class RunFolder:
    """One run. Raises DataError if the folder holds another run, or one that would be overwritten."""

    def __init__(self, path: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        """about: all that must be the same for two requests to belong to one run, ready for JSON."""
        self.path = path
        self.about: dict[str, Any] = json.loads(json.dumps(about))
        self.requests: list[Measured] = []
        self.loads: list[Loaded] = []
        plan = path / PLAN
        if resume:
            self._go_on(plan)
            return
        if plan.exists():
            raise DataError(f"{path} already holds a run. Add --resume to go on with it, or choose another --output.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            plan.write_text(json.dumps(self.about), encoding="utf-8")
            for name in (REQUESTS, LOADS):
                (path / name).write_text("", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}. Choose another --output.") from None

    def _go_on(self, plan: Path) -> None:
        try:
            known = json.loads(plan.read_text(encoding="utf-8"))
            self.requests = [Measured(**record) for record in self._records(REQUESTS)]
            self.loads = [Loaded(**record) for record in self._records(LOADS)]
        except FileNotFoundError:
            raise DataError(f"{self.path} holds no run to go on with. Leave out --resume.") from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"The run in {self.path} cannot be read: {error}. Choose another --output.") from None
        if known != self.about:
            other = [key for key in {**known, **self.about} if known.get(key) != self.about.get(key)]
            raise DataError(f"{self.path} holds a run with other {', '.join(other)}. Choose another --output.")

    def _records(self, name: str) -> list[dict[str, Any]]:
        """Whole lines only: a run may have been killed while it wrote one."""
        text = (self.path / name).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            (self.path / name).write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]

    def keep(self, one: Measured | Loaded) -> None:
        """Write one measurement down at once."""
        name = REQUESTS if isinstance(one, Measured) else LOADS
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        if isinstance(one, Measured):
            self.requests.append(one)
        else:
            self.loads.append(one)

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The whole report, written to `bench.json` too."""
        whole = {**self.about, **results, "requests": [asdict(one) for one in self.requests]}
        (self.path / REPORT).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        return whole
