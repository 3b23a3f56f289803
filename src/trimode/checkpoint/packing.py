"""Weights as the native engine wants them: packed matrices and float32 vectors, made a few megabytes at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trimode.checkpoint.names import Fused, layout
from trimode.checkpoint.packed_files import kind_of
from trimode.checkpoint.store import Checkpoint
from trimode.device import has_tiles
from trimode.model.native import BLOCKS, Precision, borrowed_matrix, new_matrix

__all__ = ["packed_weights"]


def packed_weights(checkpoint: Checkpoint, precision: Precision) -> Iterator[tuple[str, Any]]:
    """Every parameter by trimode's name, the embedding first: what `NativeForward.load` takes."""
    if checkpoint.packed is not None:
        yield from _from_packed(checkpoint, precision)
        return
    for fused in layout(checkpoint.config):
        yield fused.name, _matrix(checkpoint, fused, precision) if len(fused.shape) == 2 else _vector(checkpoint, fused)


def _from_packed(checkpoint: Checkpoint, precision: Precision) -> Iterator[tuple[str, Any]]:
    """The mapped file itself, in float32 too; in bfloat16 its numbers, written out."""
    packed = checkpoint.packed
    assert packed is not None
    file = packed.mapped()
    for fused in layout(checkpoint.config):
        matrix = packed.matrices.get(fused.name)
        if matrix is None:
            out = torch.empty(fused.shape)
            packed.vectors[fused.name].read_into(out)
            yield fused.name, out.numpy()
        elif precision != "bfloat16":
            yield fused.name, borrowed_matrix(matrix.kind, *matrix.shape, packed.panels(file, fused.name))
        else:
            whole = new_matrix(precision, *matrix.shape)
            for start, rows in matrix.rows(packed.panels(file, fused.name)):
                whole.pack_floats(start, np.ascontiguousarray(rows))
            yield fused.name, whole


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
    is_few = encodings <= {"Q4_0", "Q4_1"} or encodings == {"Q8_0"}
    as_it_is = is_few and precision != "bfloat16"
    is_int8 = precision == "int8"
    kind = kind_of(encodings, tiles=is_int8 and has_tiles()) if as_it_is or is_int8 else precision
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
