"""A measurement's folder: what was asked, one JSON record a line as it is measured, so that a stopped run goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimode.errors import DataError

__all__ = ["RunFolder"]


class RunFolder:
    """Open with `begin` or `resume`; every record is on the disk when `append` returns."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        """All so far, those of the stopped run first."""
        self._plan = folder / "plan.json"
        self._lines = folder / f"{name}.jsonl"

    @classmethod
    def open(cls, folder: Path, name: str, about: Mapping[str, Any], *, resume: bool) -> "RunFolder":
        """A new run, or with `resume` the stopped one. Raises DataError where the folder holds another or none."""
        run = cls(folder, name)
        plain = json.loads(json.dumps(about))
        if resume:
            run._take_up(plain)
            return run
        if run._plan.is_file():
            raise DataError(f"{folder} already holds a run. Add --resume to go on with it, or choose another --output.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run._lines.write_text("", encoding="utf-8")
            run._plan.write_text(json.dumps(plain, indent=1), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror}. Choose another --output.") from None
        return run

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one record."""
        self.records.append(dict(record))
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, name: str, report: Mapping[str, Any]) -> Path:
        """Write a report beside the records, whole or not at all."""
        path = self.folder / name
        partly = path.with_suffix(".part")
        partly.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partly, path)
        return path

    def _take_up(self, about: Mapping[str, Any]) -> None:
        if not self._plan.is_file():
            raise DataError(f"{self.folder} holds no run to go on with. Leave out --resume.")
        known = _parse(self._plan.read_text(encoding="utf-8"), str(self._plan))
        differing = sorted(key for key in {*known, *about} if known.get(key) != about.get(key))
        if differing:
            raise DataError(
                f"{self.folder} holds a run that differs in {', '.join(differing[:3])}. "
                "Give the same command again with --resume, or choose another --output."
            )
        lines = self._lines.read_text(encoding="utf-8").split("\n")
        # a run that was killed while it wrote leaves a line without its end
        whole, rest = lines[:-1], lines[-1]
        self.records = [_parse(line, f"{self._lines}, line {n}") for n, line in enumerate(whole, 1)]
        if rest:
            self._lines.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}). Start anew in another --output.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object. Start anew in another --output.")
    return record
