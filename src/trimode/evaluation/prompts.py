"""Prompts to measure with: a JSONL file, or the built-in ones of five kinds."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import DataError

__all__ = ["BenchPrompt", "read_bench_prompts"]

BUILT_IN = Path(__file__).parent / "prompts.jsonl"
"""Twenty prompts; each five in a row are of five kinds, so that a limit keeps the mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPrompt:
    """One prompt and what kind of work it asks for."""

    prompt: str | tuple[int, ...]
    """A text, or ids for checkpoints without a tokenizer."""
    category: str = "all"

    def as_asked(self) -> str | list[int]:
        """As `generate` takes it."""
        return list(self.prompt) if isinstance(self.prompt, tuple) else self.prompt


def read_bench_prompts(path: Path | None = None, *, limit: int | None = None) -> list[BenchPrompt]:
    """The prompts of a file (plain or gzipped), or the built-in ones. Raises DataError naming the line."""
    source = BUILT_IN if path is None else path
    try:
        data = source.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError:
        raise DataError(f"There is no file {source}. Name a JSONL file of prompts.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}. Name a JSONL file of prompts, plain or gzipped.") from None
    prompts = [_parse(line, f"{source}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise DataError(f"{source} holds no prompts. Give one JSON object a line, with `prompt`.")
    return prompts[:limit]


def _parse(line: str, where: str) -> BenchPrompt:
    try:
        record: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). Give one object with `prompt`.") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise DataError(f"{where}: there is no `prompt` in {line.strip()[:60]!r}. Give one object with `prompt`.")
    prompt, category = record["prompt"], record.get("category", "all")
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: `prompt` must be a text or a list of ids, not empty; got {str(prompt)[:60]!r}.")
    if not isinstance(category, str):
        raise DataError(f"{where}: `category` must be a text; got {category!r}.")
    return BenchPrompt(prompt=prompt, category=category)
