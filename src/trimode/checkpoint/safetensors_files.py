"""Where the tensors of a safetensors checkpoint lie: one file, or shards with an index.

The format is eight bytes of header length (little-endian), a JSON header, then the numbers. Headers come from strangers, so
every length and offset is checked before it is used. Reading the numbers is left to `stored`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from trimode.checkpoint.stored import StoredTensor, listed
from trimode.errors import CheckpointError

__all__ = ["read_directory", "read_header", "read_json", "read_metadata"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
}

_LONGEST_HEADER_BYTES = 100_000_000
"""The format's own limit; it also keeps a damaged length from filling the memory."""


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `directory`, by its name in the file."""
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _read_shards(directory / INDEX)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise CheckpointError(
            f"{directory} holds only pickled weights, which can run code when loaded. Convert them to {SINGLE} first."
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}.")


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map that says which shard holds what.")
    tensors: dict[str, StoredTensor] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index} names the shard {file!r}, which is not a file beside it.")
    files = list(dict.fromkeys(weight_map.values()))
    absent = [file for file in files if not (index.parent / file).exists()]
    if absent:
        raise CheckpointError(f"{index.parent} lacks {len(absent)} of {len(files)} shards: {listed(absent)}.")
    for file in files:
        shard = read_header(index.parent / file)
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise CheckpointError(f"{index.parent / file} repeats tensors of another shard: {listed(twice)}.")
        tensors.update(shard)
    lost = [name for name, file in weight_map.items() if name not in tensors or tensors[name].path.name != file]
    if lost:
        raise CheckpointError(f"{index} promises tensors that its shards do not hold: {listed(lost)}.")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What one file says about itself. Raises CheckpointError when its header is damaged."""
    metadata = _header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ is {metadata!r}.")
    return {str(key): str(value) for key, value in metadata.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises CheckpointError when the header does not describe the file exactly."""
    header, header_bytes, file_bytes = _header(path)
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()}

    position = 8 + header_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path} is damaged: {tensor.name} {fault}.")
        position += tensor.num_bytes
    if position != file_bytes:
        fault = "is cut off" if position > file_bytes else "has bytes that no tensor owns"
        raise CheckpointError(f"{path} {fault}: its header describes {position} bytes, the file has {file_bytes}.")
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, its bytes and the file's."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: it has only {file_bytes} bytes.")
            header_bytes = int.from_bytes(start, "little")
            if header_bytes > min(file_bytes - 8, _LONGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is cut off or not a safetensors file: its header would take {header_bytes} bytes "
                    f"of {file_bytes}."
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {_first_line(error)}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: it is not a JSON object.")
    return header, header_bytes, file_bytes


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path} has a damaged header: {name} has {what}.")

    if not isinstance(entry, dict):
        raise fault("no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise fault(f"the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise fault(f"the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fault(f"the offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise fault(f"{end - begin} bytes where {dtype} {shape} needs {math.prod(shape) * _ITEM_BYTES[dtype]}")
    return StoredTensor(path, name, start + begin, end - begin, tuple(shape), dtype)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {_first_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(value).__name__}.")
    return value
