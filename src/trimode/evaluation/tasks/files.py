"""JSONL files of examples, plain or gzipped; a fault is told with its line."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimode.errors import DataError
from trimode.evaluation.tasks.interface import Example

__all__ = ["read_examples"]


def read_examples(
    path: Path, parse: Callable[[Mapping[str, Any], int], Example], *, limit: int | None, wanted: str
) -> list[Example]:
    """The first `limit` examples. `parse` takes an object and its number, and raises KeyError, TypeError or ValueError with the fault.

    wanted: what a line should be, for the complaint. Raises DataError.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError:
        raise DataError(f"There is no file {path}. Name a JSONL file of {wanted}.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Name a JSONL file of {wanted}, plain or gzipped.") from None
    examples: list[Example] = []
    for number, line in enumerate(text.split("\n"), 1):
        if limit is not None and len(examples) >= limit:
            break
        if line.strip():
            examples.append(_parse(line, parse, len(examples), f"{path}, line {number}", wanted))
    if not examples:
        raise DataError(f"{path} holds no examples. Give one JSON object a line: {wanted}.")
    return examples


def _parse(
    line: str, parse: Callable[[Mapping[str, Any], int], Example], number: int, where: str, wanted: str
) -> Example:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). Each line is one of {wanted}.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: {line.strip()[:40]!r} is not an object. Each line is one of {wanted}.")
    try:
        return parse(record, number)
    except KeyError as error:
        raise DataError(f"{where}: there is no {error}. Each line is one of {wanted}.") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}. Each line is one of {wanted}.") from None
