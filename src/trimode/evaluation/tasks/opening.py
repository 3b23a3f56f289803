"""From what a user writes, `gsm8k=FILE,copy`, to tasks."""

from collections.abc import Sequence
from pathlib import Path

from trimode.errors import SettingError, nearest
from trimode.evaluation.tasks.extraction import extraction
from trimode.evaluation.tasks.gsm8k import gsm8k
from trimode.evaluation.tasks.humaneval import humaneval
from trimode.evaluation.tasks.interface import Task
from trimode.evaluation.tasks.probes import copying, counting

__all__ = ["TASKS", "needs_sandbox", "open_tasks"]

FROM_FILES = {"gsm8k": gsm8k, "humaneval": humaneval}
FROM_SEED = {"json": extraction, "copy": copying, "count": counting}
TASKS = (*FROM_FILES, *FROM_SEED)


def open_tasks(written: Sequence[str], *, limit: int | None, seed: int) -> list[Task]:
    """The tasks of these words, each a name or `name=FILE`. Raises SettingError, DataError."""
    tasks: list[Task] = []
    for word in written:
        name, equals, file = word.partition("=")
        if name not in TASKS:
            raise SettingError(f"There is no task {name!r}.{nearest(name, TASKS)} There are {', '.join(TASKS)}.")
        if any(task.name == name for task in tasks):
            raise SettingError(f"Task {name} is named twice. Leave one out.")
        if name in FROM_FILES:
            if not file:
                raise SettingError(f"Task {name} needs its file: {name}=FILE, JSONL as published, plain or gzipped.")
            tasks.append(FROM_FILES[name](Path(file), limit=limit))
        else:
            if equals:
                raise SettingError(f"Task {name} makes its own examples; got a file {file!r}. Write {name} alone.")
            tasks.append(FROM_SEED[name](seed, limit=limit))
    if not tasks:
        raise SettingError(f"No task is named. There are {', '.join(TASKS)}.")
    return tasks


def needs_sandbox(tasks: Sequence[Task]) -> bool:
    """Whether grading runs programs."""
    return any(task.name == "humaneval" for task in tasks)
