"""What a task is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Example", "Grade", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One thing to ask."""

    id: str
    prompt: str
    reference: Any
    """What the grading needs; plain values."""
    shots: tuple[tuple[str, str], ...] = ()
    """Prompts of the same kind with their right answers, to go before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What an answer is worth."""

    score: float
    """1 right, 0 wrong."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Shares of it that are right, by name."""
    note: str = ""
    """What was read from the answer, or why it is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Examples, and how their answers are graded."""

    name: str
    examples: Sequence[Example]
    grade: Callable[[Example, str], Grade]
    max_new_tokens: int
    """Enough for a right answer; whoever asks may set another."""
