"""A model's own answers to a list of prompts, written to a file that can be continued.

Each line of the output is a whole training document: the prompt, the answer, and the ids of both exactly as the model saw and made
them (encoding the text again may split it otherwise). What answers is handed in; this module knows no decoder. A line is appended
once its batch is done, so an interrupted run continues behind the last whole line.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import DataError, TrimodeError

__all__ = ["Answer", "Answerer", "distill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model made of one prompt."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    text: str
    finish_reason: str


Answerer = Callable[[Sequence[Any]], list[Answer]]
"""Answers a batch of prompts. Raises TrimodeError if one of them cannot be answered."""

WINDOW = 8
"""Batches that are sorted by length together: neighbours of like length waste less, and a stop loses less than all."""


def distill(
    prompts: Sequence[tuple[int, Mapping[str, Any]]],
    answer: Answerer,
    path: Path,
    *,
    batch_size: int = 32,
    on_bad: Callable[[int, str], None],
) -> Iterator[int]:
    """Append an answer for each numbered prompt record that `path` does not hold yet; yields how many are done, at first and
    after each batch.

    A record has `prompt` (text) or `messages`. on_bad is told the line number and the reason of each that cannot be answered.
    """
    done = _lines_done(path)
    left = [(number, record) for number, record in prompts if number not in done]
    num_done = len(prompts) - len(left)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        yield num_done
        for window in _chunks(left, batch_size * WINDOW):
            by_length = sorted(window, key=lambda item: len(str(_prompt(item[1]))))
            for batch in _chunks(by_length, batch_size):
                for (number, record), answered in zip(batch, _answers(batch, answer, on_bad), strict=True):
                    if answered is not None:
                        file.write(json.dumps(_line(number, record, answered), ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                num_done += len(batch)
                yield num_done


def _prompt(record: Mapping[str, Any]) -> Any:
    return record["messages"] if "messages" in record else record["prompt"]


def _answers(
    batch: Sequence[tuple[int, Mapping[str, Any]]], answer: Answerer, on_bad: Callable[[int, str], None]
) -> list[Answer | None]:
    try:
        return list(answer([_prompt(record) for _, record in batch]))
    except TrimodeError as error:
        if len(batch) == 1:
            on_bad(batch[0][0], str(error))
            return [None]
    # one of them is at fault; alone, each tells for itself
    return [one for item in batch for one in _answers([item], answer, on_bad)]


def _line(number: int, record: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    given = {key: record[key] for key in ("source", "category", "prompt", "messages") if key in record}
    return {
        "line": number,
        **given,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_ids": list(answer.prompt_ids),
        "answer_ids": list(answer.answer_ids),
    }


def _lines_done(path: Path) -> set[int]:
    """Numbers of the prompts that the file answers; a line that a crash cut off is removed."""
    if not path.exists():
        return set()
    done = set()
    end = 0
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["line"])
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path} is not an earlier run's output: line {row} names no prompt. Choose another file."
                ) from None
            end += len(line)
    os.truncate(path, end)
    return done


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
