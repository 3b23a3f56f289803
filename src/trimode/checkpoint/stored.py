"""One tensor as it lies in a file, and how its numbers get into memory.

Nothing is memory-mapped: a mapped file's pages count as resident memory next to the tensors made of them. Rows are read a few
megabytes at a time straight into their place in a tensor that already has its final shape and dtype, so loading takes the
memory of the result and little more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trimode.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCKS", "PLAIN", "StoredTensor", "listed"]

PLAIN = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Encodings that are numbers as they stand, with their bytes."""

BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
"""GGUF's quantised encodings that trimode reads: numbers in a block, and the block's bytes."""

_CHUNK_BYTES = 4 << 20
"""Float32 numbers decoded at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and how it is written."""

    path: Path
    name: str
    """Its name in the file."""
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    encoding: str
    """One of PLAIN or BLOCKS; anything else can be listed but not read."""
    interleaved_heads: int = 0
    """Not 0: rows are grouped by this many heads, and in each head the two halves that RoPE turns against each other are
    interleaved, as llama.cpp keeps them. Reading puts the halves one after the other again."""

    @property
    def readable(self) -> bool:
        return self.encoding in PLAIN or self.encoding in BLOCKS

    def read_into(self, out: "Tensor") -> None:
        """Fill `out`, contiguous, of this shape and of any floating dtype and device."""
        rows, columns = self._rows_and_columns()
        if rows * columns == 0:
            return
        out = out.view(rows, columns)
        if not self.interleaved_heads and out.device.type == "cpu" and out.dtype == _torch_dtype(self.encoding):
            import torch

            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                self._fill(file, out.view(-1).view(torch.uint8).numpy().data)
            return
        for start, raw, count in self._raw_rows():
            chunk = _decode(raw, self.encoding, count, columns)
            place = out[start : start + count]
            if pairs := self._pairs():
                chunk = chunk.view(-1, pairs, 2, columns).transpose(1, 2)
                place = place.view(-1, 2, pairs, columns)
            place.copy_(chunk)

    def float_rows(self) -> "Iterator[tuple[int, Tensor]]":
        """The numbers in float32, a few megabytes of rows at a time, each with the number of its first row."""
        _, columns = self._rows_and_columns()
        for start, raw, count in self._raw_rows():
            chunk = _decode(raw, self.encoding, count, columns).float()
            if pairs := self._pairs():
                chunk = chunk.view(-1, pairs, 2, columns).transpose(1, 2).reshape(count, columns)
            yield start, chunk

    def block_rows(self) -> "Iterator[tuple[list[int], bytearray]]":
        """Rows as the file has them, a few megabytes at a time, and which row each one is."""
        for start, raw, count in self._raw_rows():
            order = list(range(start, start + count))
            if pairs := self._pairs():
                order = [i - i % (2 * pairs) + i % 2 * pairs + i % (2 * pairs) // 2 for i in order]
            yield order, raw

    def _pairs(self) -> int:
        return self._rows_and_columns()[0] // self.interleaved_heads // 2 if self.interleaved_heads else 0

    def _raw_rows(self) -> "Iterator[tuple[int, bytearray, int]]":
        """First row, bytes and number of rows of each piece; whole heads where they are interleaved. The bytes are used again."""
        rows, columns = self._rows_and_columns()
        row_bytes = self.num_bytes // rows
        step = max(1, _CHUNK_BYTES // (4 * columns))
        if pairs := self._pairs():
            step = max(1, step // (2 * pairs)) * 2 * pairs
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            buffer = bytearray(min(step, rows) * row_bytes)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                if count * row_bytes != len(buffer):
                    buffer = bytearray(count * row_bytes)
                self._fill(file, memoryview(buffer))
                yield start, buffer, count

    def _rows_and_columns(self) -> tuple[int, int]:
        if len(self.shape) == 1:
            return (self.shape[0], 1) if self.interleaved_heads else (1, self.shape[0])
        return self.shape[0], self.shape[1]

    def _fill(self, file: BinaryIO, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done : done + (64 << 20)])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} ended while {self.name} was read. It changed or is cut off.")
            done += count


def _torch_dtype(encoding: str):
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(encoding)


def _decode(raw: bytearray, encoding: str, rows: int, columns: int) -> "Tensor":
    """Numbers [rows, columns] in a dtype that holds them exactly."""
    import torch

    dtype = _torch_dtype(encoding)
    if dtype is not None:
        return torch.frombuffer(raw, dtype=dtype).view(rows, columns)
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[encoding])).view(rows, columns)


def listed(names: "list[str]") -> str:
    """At most five names, then how many more."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
