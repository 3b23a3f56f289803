"""Weights as the native engine wants them: packed matrices and float32 vectors, made a few megabytes at a time."""

from collections.abc import Iterator
from typing import Any

import torch

from trimode.checkpoint.names import Fused, layout
from trimode.checkpoint.store import Checkpoint
from trimode.model.native import BLOCKS, Precision, new_matrix

__all__ = ["packed_weights"]


def packed_weights(checkpoint: Checkpoint, precision: Precision) -> Iterator[tuple[str, Any]]:
    """Every parameter by trimode's name, the embedding first: what `NativeForward.load` takes."""
    for fused in layout(checkpoint.config):
        yield fused.name, _matrix(checkpoint, fused, precision) if len(fused.shape) == 2 else _vector(checkpoint, fused)


def _vector(checkpoint: Checkpoint, fused: Fused) -> Any:
    out = torch.empty(fused.shape)
    start = 0
    for part, shape in fused.parts:
        checkpoint.stored[part].read_into(out[start : start + shape[0]])
        start += shape[0]
    return out.numpy()


def _matrix(checkpoint: Checkpoint, fused: Fused, precision: Precision) -> Any:
    parts = [(checkpoint.stored[name], shape[0]) for name, shape in fused.parts]
    encodings = {stored.encoding for stored, _ in parts}
    # few bits stay as they are stored: the very numbers in float32 too, in a fifth of the bytes
    stored_kind = "u4" if encodings <= {"Q4_0", "Q4_1"} else "u8" if encodings == {"Q8_0"} else None
    as_it_is = stored_kind is not None and precision != "bfloat16"
    kind = stored_kind if as_it_is and stored_kind is not None else "u8" if precision == "int8" else precision
    matrix = new_matrix(kind, *fused.shape)
    first = 0
    for stored, num_rows in parts:
        if as_it_is:
            for order, raw in stored.block_rows():
                matrix.pack_blocks(BLOCKS[stored.encoding], [first + i for i in order], raw)
        else:
            for start, rows in stored.float_rows():
                matrix.pack_floats(first + start, rows.contiguous().numpy())
        first += num_rows
    return matrix
