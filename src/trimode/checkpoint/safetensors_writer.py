"""Writing safetensors one tensor at a time, so that a checkpoint is never in memory twice.

The format puts the header first, though dtypes are known only once the tensors have come. So room is left for it, the numbers
are written behind, and the header is filled in at the end, padded with spaces as the format allows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from trimode.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["ENCODINGS", "ShardWriter"]

ENCODINGS = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}

_ENTRY_BYTES = 320
"""Room per tensor: a name, a dtype, a shape of two and two offsets take 200 at most."""

_CHUNK_ROWS_BYTES = 64 << 20


class ShardWriter:
    """One file, finished when the `with` block ends well."""

    def __init__(self, path: Path, *, room_for: int, metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._metadata = dict(metadata or {"format": "pt"})
        self._header_bytes = 64 + _ENTRY_BYTES * room_for + 2 * len(json.dumps(self._metadata))
        self._header_bytes += -(8 + self._header_bytes) % 64  # numbers begin at a multiple of 64
        self._entries: dict[str, dict] = {}
        self.num_bytes = 0
        """Bytes of numbers so far."""
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._header_bytes)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def write(self, name: str, tensor: "Tensor") -> None:
        """Append a tensor of one or two dimensions, or rows of one."""
        import torch

        encoding = ENCODINGS.get(str(tensor.dtype))
        if encoding is None:
            raise CheckpointError(f"{name} is {tensor.dtype}; checkpoints hold floating-point numbers.")
        assert name not in self._entries
        start = self.num_bytes
        rows = tensor.detach() if tensor.dim() > 1 else tensor.detach().view(1, -1)
        step = max(1, _CHUNK_ROWS_BYTES // max(1, rows.shape[1] * rows.element_size()))
        for first in range(0, rows.shape[0], step):
            chunk = rows[first : first + step].cpu().contiguous()
            self.num_bytes += self._file.write(chunk.view(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {"dtype": encoding, "shape": list(tensor.shape), "data_offsets": [start, self.num_bytes]}

    def write_bytes(self, name: str, array: "np.ndarray") -> None:
        """Append bytes."""
        assert array.dtype == "uint8"
        self._append(name, array, "U8")

    def write_array(self, name: str, array: "np.ndarray") -> None:
        """Append float32 numbers."""
        assert array.dtype == "float32"
        self._append(name, array, "F32")

    def _append(self, name: str, array: "np.ndarray", encoding: str) -> None:
        assert name not in self._entries
        assert array.flags.c_contiguous
        start = self.num_bytes
        self.num_bytes += self._file.write(array.data.cast("B"))
        self._entries[name] = {"dtype": encoding, "shape": list(array.shape), "data_offsets": [start, self.num_bytes]}

    def close(self) -> None:
        """Fill in the header."""
        header = json.dumps({"__metadata__": self._metadata, **self._entries}, separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
