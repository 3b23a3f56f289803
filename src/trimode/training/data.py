"""Prompts and training documents, from files to ids."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from trimode.diffusion.corruption import SampleNoise
from trimode.errors import DataError, TrimodeError

__all__ = ["Document", "Mixture", "TokenBatch", "make_documents", "pack", "read_prompts", "read_records"]

SHORTEST_ANSWER = 3
"""Fewest tokens of a document that may be learnt: an anchor's successor, and one behind it to draft."""

REMEDY = (
    """Mend it, or leave bad lines out: --bad-lines skip (trimode distill), data.bad_lines = "skip" (recipes, --set)."""
)

Skip = Callable[[str], None]
"""Told about each line that is left out."""


def read_records(path: Path, *, skip: Skip | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, gzipped or not, with their line numbers. Without `skip`, a bad line is a DataError."""
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r}.")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                fault = None
                record: Any = None
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(record, dict):
                        fault = "it is not an object"
                except UnicodeDecodeError:
                    fault = "it is not UTF-8"
                except ValueError as error:
                    fault = f"it is not JSON ({error})"
                if fault is None:
                    yield number, record
                elif skip is None:
                    raise DataError(f"Line {number} of {path}: {fault}. {REMEDY}")
                else:
                    skip(f"line {number} of {path}: {fault}")
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def read_prompts(path: Path, *, limit: int | None = None, skip: Skip | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Numbered records that have a `prompt` (text) or `messages`. Raises DataError for an empty file."""
    records: list[tuple[int, dict[str, Any]]] = []
    for number, record in read_records(path, skip=skip):
        if limit is not None and len(records) == limit:
            break
        prompt, messages = record.get("prompt"), record.get("messages")
        if (isinstance(prompt, str) and prompt.strip()) or (isinstance(messages, list) and messages):
            records.append((number, record))
        elif skip is None:
            raise DataError(f"Line {number} of {path}: it has no prompt (a text) and no messages. {REMEDY}")
        else:
            skip(f"line {number} of {path}: it has no prompt and no messages")
    if not records:
        raise DataError(f"{path} holds no prompts.")
    return records


@dataclass(frozen=True, slots=True)
class Document:
    """One text in ids, and what of it may be learnt."""

    ids: tuple[int, ...]
    num_prompt: int
    """Leading ids that are given: never masked, never scored."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Documents behind one another without padding; none sees another."""

    tokens: Tensor
    """[N]"""
    lengths: tuple[int, ...]
    num_prompts: tuple[int, ...]
    """Given ids of each document."""
    samples: tuple[int, ...]
    """Global index of each document in the run: what its noise hangs on."""
    progress: float = 0.0
    """Share of the run that is done, for curricula."""

    @property
    def positions(self) -> Tensor:
        """[N] Each token's place in its own document."""
        return torch.cat([torch.arange(n, device=self.tokens.device) for n in self.lengths])

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each document begins."""
        return tuple(accumulate((0, *self.lengths[:-1])))


def pack(
    documents: Sequence[Document], samples: Sequence[int], *, progress: float = 0.0, device: torch.device | str = "cpu"
) -> TokenBatch:
    """Documents to a batch."""
    return TokenBatch(
        tokens=torch.tensor([token for document in documents for token in document.ids], device=device),
        lengths=tuple(len(document.ids) for document in documents),
        num_prompts=tuple(document.num_prompt for document in documents),
        samples=tuple(samples),
        progress=progress,
    )


class Mixture:
    """Sources of documents in fixed shares, as one endless sequence that can be entered anywhere.

    Each pass takes from every source its share, goes on through a source where the last pass left it, and shuffles by seed.
    """

    def __init__(self, sources: Sequence[tuple[Sequence[Document], float]], seed: int = 0) -> None:
        if not sources or any(not documents for documents, _ in sources):
            raise DataError("There are no documents to train on.")
        total = sum(weight for _, weight in sources)
        if total <= 0 or any(weight < 0 for _, weight in sources):
            raise DataError("The weights of the data sources must not be negative, and one must be above 0.")
        size = sum(len(documents) for documents, _ in sources)
        self._sources = [documents for documents, _ in sources]
        self._shares = [max(round(size * weight / total), 1 if weight else 0) for _, weight in sources]
        self._seed = seed
        self._order = lru_cache(maxsize=4 * len(sources) + 4)(self._shuffled)

    @property
    def pass_length(self) -> int:
        """Documents in one pass."""
        return sum(self._shares)

    def __getitem__(self, index: int) -> Document:
        number, place = divmod(index, self.pass_length)
        slot = self._order("pass", number, self.pass_length)[place]
        for source, (documents, share) in enumerate(zip(self._sources, self._shares, strict=True)):
            if slot < share:
                epoch, at = divmod(number * share + slot, len(documents))
                return documents[self._order(f"source {source}", epoch, len(documents))[at]]
            slot -= share
        raise AssertionError("a slot beyond all shares")

    def _shuffled(self, what: str, number: int, length: int) -> list[int]:
        generator = SampleNoise(self._seed).of_text(f"{what} {number}")
        return torch.randperm(length, generator=generator).tolist()


Encode = Callable[[Any], tuple[list[int], int]]
"""A chat's `messages` or a plain text to ids and how many of them are given."""


def make_documents(
    records: Iterable[tuple[int, Mapping[str, Any]]],
    where: str,
    encode: Encode,
    *,
    max_tokens: int,
    vocab_size: int,
    skip: Skip | None = None,
) -> list[Document]:
    """Training documents: lines with `prompt_ids` and `answer_ids` (as `trimode distill` writes them), `messages` whose last one
    is the assistant's, or `text`. What is longer than max_tokens is cut; what then holds nothing to learn is refused or skipped.

    where: what the numbered lines lie in, for complaints.
    """
    documents = []
    for number, record in records:
        try:
            document = _document(record, encode, max_tokens, vocab_size)
        except TrimodeError as error:
            fault = f"line {number} of {where}: {error}"
            if skip is None:
                raise DataError(f"L{fault[1:]} {REMEDY}") from None
            skip(fault)
            continue
        documents.append(document)
    if not documents:
        raise DataError(f"{where} holds no documents.")
    return documents


def _document(record: Mapping[str, Any], encode: Encode, max_tokens: int, vocab_size: int) -> Document:
    if "answer_ids" in record:
        prompt, answer = record.get("prompt_ids"), record["answer_ids"]
        if not _are_ids(prompt, vocab_size) or not _are_ids(answer, vocab_size):
            raise DataError(f"prompt_ids and answer_ids must be lists of ids below {vocab_size:,}.")
        ids, given = [*prompt, *answer], len(prompt)
    elif "messages" in record or "text" in record:
        ids, given = encode(record["messages"] if "messages" in record else record["text"])
    else:
        raise DataError("it has no answer_ids, no messages and no text.")
    document = Document(tuple(ids[:max_tokens]), given)
    if len(document.ids) - given < SHORTEST_ANSWER:
        raise DataError(f"it has fewer than {SHORTEST_ANSWER} tokens to learn within {max_tokens:,}.")
    return document


def _are_ids(value: Any, vocab_size: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < vocab_size for i in value)
