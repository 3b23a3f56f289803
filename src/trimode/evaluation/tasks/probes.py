"""Copying and counting: trivial for a model that writes left to right, telling for one that fills many places at once.

Where tokens depend on one another, filling them together goes wrong first; the right answer is known, and its length too.
"""

import random
import re

from trimode.evaluation.tasks.interface import Example, Grade, Task

__all__ = ["copying", "counting"]

WORDS = [
    "amber", "anchor", "apple", "arrow", "badge", "basin", "beacon", "berry", "blanket", "bottle", "branch", "bridge",
    "butter", "candle", "canyon", "carpet", "castle", "cedar", "chalk", "cherry", "circle", "copper", "coral",
    "cotton", "crystal", "desert", "eagle", "falcon", "feather", "forest", "garden", "ginger", "hammer", "harbor",
    "honey", "island", "jacket", "jungle", "kettle", "ladder", "lantern", "lemon", "marble", "meadow", "mirror",
    "needle", "olive", "orbit", "paddle", "pepper", "piano", "pillow", "planet", "pocket", "rabbit", "ribbon",
    "river", "rocket", "saddle", "shadow", "silver", "spider", "summit", "temple", "timber", "tunnel", "turtle",
    "velvet", "walnut", "willow", "window", "winter",
]  # fmt: skip


def copying(seed: int, *, limit: int | None) -> Task:
    """Lists of random words, to be repeated word for word."""
    examples = []
    for number in range(limit or 50):
        rng = random.Random(f"copy {seed} {number}")
        lines = [rng.choices(WORDS, k=6 + 3 * (number % 4)) for _ in range(3)]
        asked = [("Repeat: " + " ".join(words), " ".join(words)) for words in lines]
        example = Example(id=f"copy/{seed}/{number}", prompt=asked[2][0], reference=lines[2], shots=tuple(asked[:2]))
        examples.append(example)
    return Task(name="copy", examples=examples, grade=_grade_copy, max_new_tokens=96)


def _grade_copy(example: Example, answer: str) -> Grade:
    return _sequence(example.reference, re.findall(r"[a-z]+", _body(answer).rpartition(":")[2].lower()))


def counting(seed: int, *, limit: int | None) -> Task:
    """Numbers from here to there in equal steps."""
    examples = []
    for number in range(limit or 50):
        rng = random.Random(f"count {seed} {number}")
        step, length = (1, 1, 2, 5)[number % 4], 8 + 4 * (number % 3)
        how = "by ones" if step == 1 else f"in steps of {step}"
        lines = [[str(start + step * i) for i in range(length)] for start in rng.sample(range(1, 90), 3)]
        asked = [(f"Count {how} from {line[0]} to {line[-1]}.", ", ".join(line)) for line in lines]
        example = Example(id=f"count/{seed}/{number}", prompt=asked[2][0], reference=lines[2], shots=tuple(asked[:2]))
        examples.append(example)
    return Task(name="count", examples=examples, grade=_grade_count, max_new_tokens=128)


def _grade_count(example: Example, answer: str) -> Grade:
    return _sequence(example.reference, re.findall(r"\d+", _body(answer).rpartition(":")[2]))


def _body(answer: str) -> str:
    """The longest line: a model may well say a word before it, or repeat the question's label."""
    return max(answer.splitlines() or [""], key=len)


def _sequence(expected: list[str], found: list[str]) -> Grade:
    right = 0
    while right < min(len(expected), len(found)) and expected[right] == found[right]:
        right += 1
    note = "" if found == expected else f"{right} of {len(expected)} right, {len(found)} written"
    return Grade(score=float(found == expected), parts={"prefix": right / len(expected)}, note=note)
