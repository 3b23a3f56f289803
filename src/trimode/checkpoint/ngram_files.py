"""A table of what a model tends to say, beside its weights: `ngrams.safetensors`, one tensor `slots` (see `text.ngrams`)."""

import json
import secrets
from pathlib import Path

from trimode.errors import CheckpointError, DataError
from trimode.text.ngrams import NgramTable

__all__ = ["NGRAMS", "is_table", "read_ngrams", "save_ngrams"]

NGRAMS = "ngrams.safetensors"
FACTS = "ngrams"
"""The one key of the file's metadata, for keys come in no order; its value is an object of version, num_contexts and vocab_size."""
VERSION = 1


def save_ngrams(path: Path, table: NgramTable) -> None:
    """Write a table, whole or not at all, in place of an earlier one. A link is replaced, not what it points to: the hub's cache holds
    links. Raises CheckpointError if the disk refuses."""
    from safetensors.numpy import save

    facts = {"version": VERSION, "num_contexts": table.num_contexts, "vocab_size": table.vocab_size}
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(save({"slots": table.slots}, metadata={FACTS: json.dumps(facts)}))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error


def is_table(path: Path) -> bool:
    """Whether a table lies there, of whatever model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return FACTS in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_ngrams(path: Path, vocab_size: int) -> NgramTable | None:
    """The table of a model with so many tokens; None if there is no such file. Raises CheckpointError for what is no such table."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts, slots = json.loads((file.metadata() or {}).get(FACTS, "{}")), file.get_tensor("slots")
        if facts.get("version") != VERSION:
            raise DataError(f"its version is {facts.get('version')!r}, and this trimode reads {VERSION}")
        if facts.get("vocab_size") != vocab_size:
            raise DataError(f"it is of a vocabulary of {facts.get('vocab_size')!r} tokens, not of {vocab_size}")
        num_contexts = facts.get("num_contexts")
        if type(num_contexts) is not int or not 0 <= num_contexts < len(slots):
            raise DataError(f"num_contexts is {num_contexts!r}")
        return NgramTable(slots, num_contexts, vocab_size)
    except (SafetensorError, DataError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        fault = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{path} is no table of n-grams for this model: {fault}. Remove it, or count anew."
        ) from error
