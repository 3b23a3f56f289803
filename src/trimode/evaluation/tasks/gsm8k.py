"""GSM8K (arXiv 2110.14168): word problems whose answer is a number, graded by that number alone."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from trimode.evaluation.tasks.files import read_examples
from trimode.evaluation.tasks.interface import Example, Grade, Task

__all__ = ["gsm8k", "read_number"]

WANTED = "GSM8K's problems, {question, answer} as published or {prompt, reference}"
INSTRUCTION = "\n\nThink step by step. End with a line: The answer is N."
NUMBER = re.compile(r"[-+]?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\$?\.\d+")
MARKS = (re.compile(r"####"), re.compile(r"(?i)\banswer(?:\s+is)?\s*:?"), re.compile(r"\\boxed\{"))


def gsm8k(path: Path, *, limit: int | None) -> Task:
    """The problems of a file. Raises DataError."""
    return Task(
        name="gsm8k",
        examples=read_examples(path, _parse, limit=limit, wanted=WANTED),
        grade=_grade,
        max_new_tokens=320,
    )


def read_number(text: str) -> Decimal | None:
    """The number that a text ends up at: the first one behind the last `####`, `answer is` or `\\boxed{`, else the last of all."""
    for mark in MARKS:
        found = [m.end() for m in mark.finditer(text)]
        if found and (number := NUMBER.search(text, found[-1])) is not None:
            return _value(number.group())
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(written: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[,$\s]", "", written))
    except InvalidOperation:
        return None


def _parse(record: Mapping[str, Any], number: int) -> Example:
    question = record["question"] if "question" in record else record["prompt"]
    answer = record["answer"] if "question" in record else record["reference"]
    if not isinstance(question, str) or not question.strip():
        raise TypeError(f"the question must be a text, not empty; got {str(question)[:40]!r}")
    reference = read_number(str(answer))
    if reference is None:
        raise ValueError(f"the answer holds no number; got {str(answer)[:40]!r}")
    return Example(
        id=str(record.get("id", f"gsm8k/{number}")), prompt=question.strip() + INSTRUCTION, reference=str(reference)
    )


def _grade(example: Example, answer: str) -> Grade:
    number = read_number(answer)
    right = number is not None and number == Decimal(example.reference)
    return Grade(score=float(right), note="no number" if number is None else str(number))
