"""Rows of a data set on the Hugging Face hub, read as a stream. The `datasets` package is imported when the first one is asked for."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from huggingface_hub import HfApi, constants

from trimode.errors import DataError

__all__ = ["read_hub"]

TIMEOUT_S = 20


def read_hub(
    name: str, *, subset: str | None = None, split: str = "train", limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a data set with their numbers, from 1. Raises DataError in one line if it cannot be had."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{name} is a data set of the hub, and the package 'datasets' is not installed (pip install 'trimode[train]')."
        ) from None
    wanted = name if subset is None else f"{name} ({subset})"
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=TIMEOUT_S)  # without a network `datasets` tries six times over, aloud
        rows = load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(islice(rows, limit), 1):
            yield number, dict(row)
    except Exception as error:  # the network, the hub and the package each have errors of their own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"The split {split!r} of the data set {wanted} cannot be read: {reason.rstrip('.')}. "
            "Check the name and the network, or name a JSONL file by path."
        ) from error
