"""int8 weights as the native engine multiplies them, in one safetensors file that is mapped and never read.

`model.safetensors` says `{"format": "trimode-int8-v1"}` in its metadata and holds, by trimode's names, each matrix as bytes
[panels, bytes of a panel] with its kind behind its name (`layers.0.qkv.weight.u8`), then norms and biases in float32. A panel is 16
outputs; 32 inputs of an output are a group, in s8 192:

    u8   [groups][8][16][4] bytes q, then half-precision scales d [groups][16]:  w = d (q - 128)
    u4   [groups][4][16][4] bytes of two q (inputs 8 s + j in the low half, 8 s + 4 + j in the high one), then d [groups][16] and
         m [groups][16]:  w = d q + m
    s8   [steps of 4 inputs][16][4] signed bytes q, then d [groups][16]:  w = d q

s8 is for processors with tiles of integers (AMX) and is what they write; each kind runs on each processor. Inputs are padded to a
multiple of 32, in s8 64, outputs to one of 16, panels to 64 bytes. The metadata also keeps the base's fingerprint, so
that an adapter of another base is refused. `config.json` names the format as its quantization_config: other programs refuse it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.checkpoint.names import layout
from trimode.checkpoint.safetensors_files import read_header, read_metadata
from trimode.checkpoint.safetensors_writer import ShardWriter
from trimode.checkpoint.stored import StoredTensor, listed
from trimode.errors import CheckpointError
from trimode.model.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

__all__ = [
    "FORMAT",
    "PackedFile",
    "PackedMatrix",
    "kind_of",
    "open_packed",
    "packed_bytes",
    "panel_bytes",
    "write_packed",
]

FORMAT = "trimode-int8-v1"

LANES = 16
_GROUPS = {"u8": 32, "u4": 32, "s8": 192}
_SCALE_BYTES = {"u8": 2 * LANES, "u4": 4 * LANES, "s8": 2 * LANES}
_PANELS_AT_ONCE = 64


def kind_of(encodings: Iterable[str], *, tiles: bool) -> str:
    """What a matrix of parts stored like this becomes: 4 bits that a GGUF file has stay 4 bits; else s8 where the processor multiplies
    tiles of integers."""
    return "u4" if set(encodings) <= {"Q4_0", "Q4_1"} else "s8" if tiles else "u8"


def panel_bytes(kind: str, num_inputs: int) -> int:
    """Bytes of 16 outputs."""
    weights, num_groups = _weight_bytes(kind, num_inputs)
    return -(-(weights + num_groups * _SCALE_BYTES[kind]) // 64) * 64


def _weight_bytes(kind: str, num_inputs: int) -> tuple[int, int]:
    """Bytes of a panel before its scales, and how many groups these are of."""
    padded_to = 64 if kind == "s8" else 32
    padded = -(-num_inputs // padded_to) * padded_to
    return padded * LANES // (2 if kind == "u4" else 1), -(-padded // _GROUPS[kind])


def packed_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix [outputs, inputs]; a vector stays in float32."""
    return 4 * shape[0] if len(shape) == 1 else -(-shape[0] // LANES) * panel_bytes(kind, shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """One matrix in the mapped file."""

    kind: str
    """u8, u4 or s8."""
    shape: tuple[int, int]
    """Outputs and inputs."""
    stored: StoredTensor

    def rows(self, panels: "np.ndarray") -> "Iterator[tuple[int, np.ndarray]]":
        """Its weights in float32, some rows at a time, each with the number of its first row; `panels` are its bytes."""
        import numpy as np

        outputs, inputs = self.shape
        panels = panels.reshape(-1, panel_bytes(self.kind, inputs))
        num_q, groups = _weight_bytes(self.kind, inputs)
        for first in range(0, len(panels), _PANELS_AT_ONCE):
            here = panels[first : first + _PANELS_AT_ONCE]
            n = len(here)
            halves = here[:, num_q : num_q + groups * _SCALE_BYTES[self.kind]].copy().view("<f2")
            halves = halves.astype(np.float32).reshape(n, -1, groups, LANES)
            # of each step of four inputs
            halves = halves.repeat(_GROUPS[self.kind] // 4, axis=2)
            q = here[:, :num_q].reshape(n, -1, LANES, 4)
            if self.kind == "u4":
                q = np.stack((q & 15, q >> 4), axis=2).reshape(n, -1, LANES, 4)
            if self.kind == "s8":
                q = q.view(np.int8)
            halves = halves[:, :, : q.shape[1], :, None]
            weights = q.astype(np.float32) * halves[:, 0]
            if self.kind != "s8":
                weights += halves[:, 1] if self.kind == "u4" else -128 * halves[:, 0]
            rows = weights.transpose(0, 2, 1, 3).reshape(n * LANES, -1)
            yield first * LANES, rows[: outputs - first * LANES, :inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A checked file; nothing of the numbers has been read."""

    path: Path
    matrices: Mapping[str, PackedMatrix]
    """By trimode's names."""
    vectors: Mapping[str, StoredTensor]
    base: Mapping[str, Any]
    """Fingerprint of the weights that it was made of."""

    @property
    def num_bytes(self) -> int:
        """Of all its numbers."""
        return sum(m.stored.num_bytes for m in self.matrices.values()) + sum(v.num_bytes for v in self.vectors.values())

    def mapped(self) -> "np.ndarray":
        """The whole file as bytes that the system brings in when they are looked at."""
        import numpy as np

        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def panels(self, file: "np.ndarray", name: str) -> "np.ndarray":
        """A matrix's bytes of the mapped file."""
        stored = self.matrices[name].stored
        return file[stored.offset : stored.offset + stored.num_bytes]

    def tensors(
        self, config: ModelConfig, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Every parameter by trimode's name as plain numbers, the embedding first."""
        import numpy as np
        import torch

        file = self.mapped()
        for fused in layout(config):
            tensor = torch.empty(fused.shape, dtype=dtype, device=device)
            if fused.name in self.vectors:
                self.vectors[fused.name].read_into(tensor)
            else:
                for start, rows in self.matrices[fused.name].rows(self.panels(file, fused.name)):
                    tensor[start : start + len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
            yield fused.name, tensor


def open_packed(path: Path, config: ModelConfig, version: str) -> PackedFile:
    """Check a file against the model. version: what config.json says of the format. Raises CheckpointError in one line."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} lacks {path.name}.")
    metadata = read_metadata(path)
    for where, found in ((path, metadata.get("format")), (path.parent / "config.json", version)):
        if found != FORMAT:
            raise CheckpointError(
                f"{where} is in the format {found!r}; this trimode reads {FORMAT}. "
                "Make it again from its base: trimode convert BASE --quantize int8."
            )
    tensors = read_header(path)
    if config.num_layers > len(tensors):  # before a layout of a billion layers is made
        raise CheckpointError(f"{path} has {len(tensors)} tensors, too few for {config.num_layers} layers.")
    try:
        base = json.loads(metadata.get("base", ""))
    except (ValueError, RecursionError):
        base = None
    if not isinstance(base, dict):
        raise CheckpointError(f"{path} does not say which base it was made of. Make it again from its base.")
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, StoredTensor] = {}
    for fused in layout(config):
        if len(fused.shape) == 1:
            stored = _taken(tensors, path, fused.name)
            _check(path, stored, "F32", fused.shape)
            vectors[fused.name] = stored
            continue
        outputs, inputs = fused.shape
        kind = next((kind for kind in _GROUPS if f"{fused.name}.{kind}" in tensors), "u8")
        stored = _taken(tensors, path, f"{fused.name}.{kind}")
        _check(path, stored, "U8", (-(-outputs // LANES), panel_bytes(kind, inputs)))
        matrices[fused.name] = PackedMatrix(kind=kind, shape=(outputs, inputs), stored=stored)
    if tensors:
        raise CheckpointError(f"{path} holds tensors that a {config.family} lacks: {listed(list(tensors))}.")
    return PackedFile(path=path, matrices=matrices, vectors=vectors, base=base)


def _taken(tensors: dict[str, StoredTensor], path: Path, name: str) -> StoredTensor:
    stored = tensors.pop(name, None)
    if stored is None:
        raise CheckpointError(f"{path} lacks {name}.")
    return stored


def _check(path: Path, stored: StoredTensor, encoding: str, shape: tuple[int, ...]) -> None:
    if stored.encoding != encoding or stored.shape != shape:
        raise CheckpointError(
            f"{stored.name} of {path} is {stored.encoding} {list(stored.shape)}, expected {encoding} {list(shape)}."
        )


def write_packed(path: Path, config: ModelConfig, weights: Iterable[tuple[str, Any]], base: Mapping[str, Any]) -> None:
    """Write packed matrices and float32 vectors, one at a time, by trimode's names: what `packing.packed_weights` gives."""
    import numpy as np

    metadata = {"format": FORMAT, "lanes": str(LANES), "base": json.dumps(dict(base))}
    vectors: list[tuple[str, np.ndarray]] = []
    with ShardWriter(path, room_for=len(layout(config)), metadata=metadata) as writer:
        for name, value in weights:
            if isinstance(value, np.ndarray):
                vectors.append((name, value))
            else:
                panels = value.view()
                writer.write_bytes(f"{name}.{value.kind}", panels.reshape(-(-value.num_outputs // LANES), -1))
        for name, value in vectors:  # behind the matrices, so that those begin at multiples of 64 bytes
            writer.write_array(name, value)
