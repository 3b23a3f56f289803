"""HumanEval (arXiv 2107.03374): a function to complete, graded by running its tests in the sandbox."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimode.evaluation.sandbox import Limits, run_program
from trimode.evaluation.tasks.files import read_examples
from trimode.evaluation.tasks.interface import Example, Grade, Task

__all__ = ["humaneval", "program_of"]

WANTED = "HumanEval's problems, {task_id, prompt, entry_point, test}"
INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def humaneval(path: Path, *, limit: int | None, limits: Limits | None = None) -> Task:
    """The problems of a file. Raises DataError. The caller asks `sandbox.require_confinement` first."""

    def grade(example: Example, answer: str) -> Grade:
        ran = run_program(program_of(example, answer), limits)
        return Grade(score=float(ran.passed), note=ran.end)

    return Task(
        name="humaneval",
        examples=read_examples(path, _parse, limit=limit, wanted=WANTED),
        grade=grade,
        max_new_tokens=384,
    )


def program_of(example: Example, answer: str) -> str:
    """The program that decides: the answer's function, or its lines as the continuation of the prompt, and the tests."""
    prompt, name = example.reference["prompt"], example.reference["entry_point"]
    defines = re.compile(rf"^[ \t]*(?:async\s+)?def\s+{re.escape(name)}\b", re.MULTILINE)
    blocks = [block.group(1) for block in FENCE.finditer(answer)]
    code = next((b for b in blocks if defines.search(b)), blocks[0] if blocks else answer)
    if defines.search(code):
        # what the prompt brings before the function (imports, helpers) stays
        start = defines.search(prompt)
        code = prompt[: start.start() if start else 0] + "\n" + code
    else:
        code = prompt.rstrip("\n") + "\n" + code
    return f"{code}\n\n{example.reference['test']}\n\ncheck({name})\n"


def _parse(record: Mapping[str, Any], number: int) -> Example:
    values = {name: record[name] for name in ("prompt", "entry_point", "test")}
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise TypeError(f"{name} must be a text, not empty; got {str(value)[:40]!r}")
    if not values["entry_point"].isidentifier():
        raise ValueError(f"entry_point must be the name of a function; got {values['entry_point'][:40]!r}")
    return Example(
        id=str(record.get("task_id", f"humaneval/{number}")),
        prompt=INSTRUCTION.format(values["prompt"].strip("\n")),
        reference=values,
    )
