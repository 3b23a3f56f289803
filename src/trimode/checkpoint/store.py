"""Opening, describing and writing checkpoints.

Opening reads headers only and checks everything that headers can tell, without torch: whatever is wrong with a checkpoint is
said before the first gigabyte is read.
"""

import json
import math
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.checkpoint.adapter_files import StoredAdapter, open_adapter, save_adapter
from trimode.checkpoint.config_files import (
    check_config,
    packed_format,
    read_config,
    read_generation_defaults,
    with_trimode_facts,
    write_config,
)
from trimode.checkpoint.fingerprint import base_fingerprint, same_base
from trimode.checkpoint.gguf_files import gguf_config, read_gguf
from trimode.checkpoint.names import bare_name, check_tensors, exported_name, gguf_name, layout
from trimode.checkpoint.ngram_files import NGRAMS, read_ngrams, save_ngrams
from trimode.checkpoint.packed_files import FORMAT, PackedFile, kind_of, open_packed, packed_bytes, write_packed
from trimode.checkpoint.presets import PRESETS, find_preset_file, preset_facts
from trimode.checkpoint.safetensors_files import INDEX, SINGLE, read_directory, read_json
from trimode.checkpoint.safetensors_writer import ENCODINGS, ShardWriter
from trimode.checkpoint.stored import BLOCKS, StoredTensor, listed
from trimode.checkpoint.tuning_files import GENERATION, read_auto
from trimode.device import has_tiles
from trimode.errors import CheckpointError, CheckpointNotFoundError, nearest
from trimode.model.config import ModelConfig
from trimode.text.ngrams import NgramTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimode.model.lora import Lora
    from trimode.text.tokenizer import Tokenizer

__all__ = ["Checkpoint", "describe", "new_directory", "open_checkpoint", "save_checkpoint", "save_packed_checkpoint"]

ADAPTER = "linear_spec_lora"
"""The directory of the drafter's adapter inside a checkpoint."""

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_HUB_FILES = ["*.json", "*.jinja", "model*.safetensors", NGRAMS, f"{ADAPTER}/*"]
"""What is fetched. Some repositories hold the weights a second time under another name."""

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
"""F64 counts as float32: no model is run wider than that."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers have been read and found sound."""

    name: str
    """What the user typed."""
    path: Path
    """A directory or a GGUF file."""
    config: ModelConfig
    stored_dtype: str
    """What most of the weights are: "bfloat16", "float16" or "float32"; "quantized" for a GGUF with quantised blocks; "int8" for
    packed weights."""
    weight_bytes: int
    """Bytes of the weights on disk."""
    gguf_metadata: dict[str, Any] | None = field(default=None, repr=False)
    """A GGUF file's metadata, for the tokenizer; None for directories."""
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling that generation_config.json recommends: temperature, top_p, ..."""
    auto: dict[str, Any] = field(default_factory=dict)
    """What mode `auto` stands for, as tuning wrote it into generation_config.json; empty if nobody tuned."""
    generation_path: Path | None = None
    """Where that file lies, or would; None for a GGUF file, which has no such place, and for a preset, which is everybody's."""
    stored: Mapping[str, StoredTensor] = field(repr=False)
    """Where each part lies; parts are as in `names.layout`. Empty for packed weights."""
    packed: PackedFile | None = field(default=None, repr=False)
    """Weights in the native engine's own format; None for others."""
    stored_adapter: StoredAdapter | None = field(default=None, repr=False)
    ngrams_path: Path | None = None
    """Where a table of what the model tends to say lies, or would; None for a GGUF file."""

    def tensors(self, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu") -> "Iterator[tuple[str, Tensor]]":
        """Every parameter by trimode's name, one at a time, the embedding first.

        Each is read into its final place a few megabytes at a time: the peak is what the caller keeps.
        """
        import torch

        if self.packed is not None:
            yield from self.packed.tensors(self.config, dtype=dtype, device=device)
            return
        for fused in layout(self.config):
            tensor = torch.empty(fused.shape, dtype=dtype, device=device)
            row = 0
            for part, shape in fused.parts:
                self.stored[part].read_into(tensor[row : row + shape[0]])
                row += shape[0]
            yield fused.name, tensor

    def adapter(self) -> "Lora | None":
        """The draft adapter in the dtype it is stored in, if there is one. Raises CheckpointError for another base's."""
        adapter = self.stored_adapter
        if adapter is None:
            return None
        if adapter.base is not None and not same_base(adapter.base, self.fingerprint()):
            raise CheckpointError(
                f"The adapter beside {self.name} was trained on another base: sizes or weights differ. "
                "Use the base that it belongs to, or train one for this base with trimode convert."
            )
        return adapter.read()

    def ngrams(self) -> NgramTable | None:
        """What the model tends to say, if somebody counted it."""
        return None if self.ngrams_path is None else read_ngrams(self.ngrams_path, self.config.vocab_size)

    def tokenizer(self) -> "Tokenizer | None":
        """The checkpoint's own, if it brings one."""
        from trimode.text.tokenizer import Tokenizer

        if self.gguf_metadata is not None:
            return Tokenizer.from_gguf_metadata(self.gguf_metadata)
        return Tokenizer.from_directory(self.path)

    def fingerprint(self) -> dict[str, Any]:
        """What an adapter keeps of its base."""
        return base_fingerprint(self.config, self.stored) if self.packed is None else dict(self.packed.base)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open a preset, a directory, a GGUF file or a hub id (`owner/name` or `owner/name@revision`).

    Raises CheckpointNotFoundError, UnsupportedModelError or CheckpointError, each in one line.
    """
    typed = str(name)
    if isinstance(name, str) and name in PRESETS:
        return _open_preset(name)
    path = Path(name).expanduser()
    try:
        exists = typed != "" and path.exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte: then it is none
        exists = False
    if not exists:
        path = _fetch(typed)
    if not path.is_dir() and not path.is_file():  # a pipe would be waited for without end
        raise CheckpointError(f"{path} is neither a directory nor a file.")
    return _open_directory(typed, path) if path.is_dir() else _open_gguf(typed, path)


def _open_directory(name: str, path: Path) -> Checkpoint:
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json.")
    generation_path = path / GENERATION
    generation = read_json(generation_path) if generation_path.exists() else {}
    raw = read_json(path / "config.json")
    config = read_config(raw, generation, where=str(path / "config.json"))
    version = packed_format(raw)
    packed = None if version is None else open_packed(path / SINGLE, config, version)
    tensors = {} if packed is not None else read_directory(path)
    stored = {} if packed is not None else check_tensors(config, tensors, bare_name, str(path))
    adapter = open_adapter(path / ADAPTER, config) if (path / ADAPTER / "adapter_config.json").exists() else None
    if adapter is not None:
        config = _adapted(config, adapter, path / ADAPTER)
    return Checkpoint(
        name=name,
        path=path,
        config=config,
        stored_dtype="int8" if packed is not None else _stored_dtype(stored),
        weight_bytes=packed.num_bytes if packed is not None else sum(tensor.num_bytes for tensor in tensors.values()),
        generation_defaults=read_generation_defaults(generation),
        auto=read_auto(generation, str(generation_path)),
        generation_path=generation_path,
        stored=stored,
        packed=packed,
        stored_adapter=adapter,
        ngrams_path=path / NGRAMS,
    )


def _open_gguf(name: str, path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} holds weights alone. Give the directory that also holds its config.json.")
    metadata, tensors = read_gguf(path)
    config, tensors = gguf_config(metadata, tensors, where=str(path))
    stored = check_tensors(config, tensors, gguf_name, str(path))
    return Checkpoint(
        name=name,
        path=path,
        config=config,
        stored_dtype=_stored_dtype(stored),
        weight_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        gguf_metadata=metadata,
        stored=stored,
    )


def _open_preset(name: str) -> Checkpoint:
    plain = _open_gguf(name, find_preset_file(name))
    assert plain.gguf_metadata is not None
    config = with_trimode_facts(plain.config, preset_facts(name, plain.gguf_metadata), where=f"the preset {name}")
    directory = PRESETS[name].adapter
    adapter = open_adapter(directory, config) if directory.exists() else None
    if adapter is not None:
        config = _adapted(config, adapter, directory)
    check_config(config, where=f"the preset {name}")
    return Checkpoint(
        name=name,
        path=plain.path,
        config=config,
        stored_dtype=plain.stored_dtype,
        weight_bytes=plain.weight_bytes,
        gguf_metadata=plain.gguf_metadata,
        stored=plain.stored,
        stored_adapter=adapter,
        ngrams_path=directory / NGRAMS,
    )


def _adapted(config: ModelConfig, adapter: StoredAdapter, directory: Path) -> ModelConfig:
    """The model as it is with this adapter: an adapter may say that it was trained for blocks, and of what length."""
    where = str(directory / "adapter_config.json")
    config = with_trimode_facts(config, adapter.facts, where=where)
    check_config(config, where=where)
    return config


def _fetch(name: str) -> Path:
    """The local copy of a hub repository, downloaded if need be."""
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise CheckpointNotFoundError(
            f"There is no {name!r}. Give a directory, a GGUF file, a hub id such as owner/name, "
            f"or a preset: {', '.join(PRESETS)}.{nearest(name, PRESETS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=_HUB_FILES))
    except Exception as error:  # its network and repository errors have no common base below Exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointNotFoundError(
            f"There is no directory {name!r}, and the hub does not give it: {lines[0].removeprefix('Got: ').rstrip('.: ')}."
        ) from error


def _stored_dtype(stored: Mapping[str, StoredTensor]) -> str:
    """The encoding of most numbers; norms and biases are often kept wider than the rest."""
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        if tensor.encoding in BLOCKS:
            return "quantized"
        sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + math.prod(tensor.shape)
    return _DTYPE_NAMES[max(sizes, key=sizes.__getitem__)]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is and what running it takes, ready for JSON; needs headers only."""
    config, adapter = checkpoint.config, checkpoint.stored_adapter
    has_blocks = config.mask_token_id is not None
    positions = min(4096, config.max_positions)
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_size * positions
    adapter_bytes = 0 if adapter is None else adapter.num_bytes
    ngrams = checkpoint.ngrams()
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "family": config.family,
        "parameters": config.num_parameters,
        "dtype": checkpoint.stored_dtype,
        "weight_bytes": checkpoint.weight_bytes,
        "layers": config.num_layers,
        "width": config.width,
        "heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "context": config.max_positions,
        "mask_token_id": config.mask_token_id,
        "block_length": config.block_length if has_blocks else None,
        "block_predicts": config.block_predicts if has_blocks else None,
        "modes": ["ar", "diffusion", "self_spec"] if has_blocks else ["ar"],
        "trained_for_blocks": config.trained_for_blocks,
        "adapter": None
        if adapter is None
        else {"rank": adapter.rank, "parts": adapter.parts, "parameters": adapter.num_parameters},
        "ngram_contexts": 0 if ngrams is None else ngrams.num_contexts,
        "memory_bytes": {
            dtype: (config.num_parameters + cached) * item_bytes + adapter_bytes
            for dtype, item_bytes in (("bfloat16", 2), ("float32", 4))
        }
        | {"int8": _int8_bytes(checkpoint) + 2 * cached + adapter_bytes},
    }


def _int8_bytes(checkpoint: Checkpoint) -> int:
    """Of the weights as the native engine packs them."""
    if checkpoint.packed is not None:
        return checkpoint.packed.num_bytes
    tiles = has_tiles()
    return sum(
        packed_bytes(kind_of((checkpoint.stored[part].encoding for part, _ in fused.parts), tiles=tiles), fused.shape)
        for fused in layout(checkpoint.config)
    )


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: "Iterable[tuple[str, Tensor]]",
    *,
    adapter: "Lora | None" = None,
    adapter_extra: Mapping[str, Any] | None = None,
    tokenizer: "Tokenizer | None" = None,
    ngrams: NgramTable | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face directory from tensors by trimode's names, in any order, each in the dtype it has.

    Everything is written beside the directory and renamed at the end, so that nothing half-written stays. Raises
    CheckpointError if the directory holds something already or the tensors are not exactly the model's.
    """
    check_config(config, where="the config")
    with new_directory(Path(directory)) as draft:
        dtype = _write_shards(draft, config, tensors, max_shard_bytes)
        _write_json(draft / "config.json", write_config(config, dtype=dtype))
        if adapter is not None:
            (draft / ADAPTER).mkdir()
            save_adapter(draft / ADAPTER, config, adapter, extra=adapter_extra)
        if tokenizer is not None:
            tokenizer.save(draft)
        if ngrams is not None:
            save_ngrams(draft / NGRAMS, ngrams)


def save_packed_checkpoint(
    directory: str | Path,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, Any]],
    *,
    adapter: "Lora | None" = None,
    tokenizer: "Tokenizer | None" = None,
    ngrams: NgramTable | None = None,
) -> None:
    """Write a checkpoint anew, its weights packed as `packing.packed_weights` gives them; `adapter`, `tokenizer` and `ngrams` are
    its own, read. Raises CheckpointError if the directory holds something already."""
    config = checkpoint.config
    check_config(config, where="the config")
    base = checkpoint.fingerprint()
    with new_directory(Path(directory)) as draft:
        write_packed(draft / SINGLE, config, weights, base)
        quantization = {"quantization_config": {"quant_method": FORMAT}}
        _write_json(draft / "config.json", write_config(config, dtype="float32") | quantization)
        if adapter is not None:
            stored = checkpoint.stored_adapter
            facts = {} if stored is None else dict(stored.facts)
            (draft / ADAPTER).mkdir()
            save_adapter(draft / ADAPTER, config, adapter, extra={"trimode": {**facts, "base_fingerprint": base}})
        if tokenizer is not None:
            tokenizer.save(draft)
        if ngrams is not None:
            save_ngrams(draft / NGRAMS, ngrams)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into that takes its name when all has gone well."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already and is not empty. Choose another place or remove it.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = directory.parent / f".{directory.resolve().name}.{secrets.token_hex(4)}"
        draft.mkdir()
    except OSError as error:
        raise CheckpointError(f"Cannot write beside {directory}: {error.strerror}.") from error
    try:
        yield draft
        if directory.exists():
            # into the empty one that is there, whatever it is (a mounted volume, a link, this very folder); what makes it a
            # checkpoint comes last
            for child in sorted(draft.iterdir(), key=lambda child: child.name == "config.json"):
                shutil.move(child, directory / child.name)
        else:
            draft.rename(directory)
    except OSError as error:
        raise CheckpointError(f"Cannot write {directory}: {error.strerror}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already if all went well


def _write_shards(draft: Path, config: ModelConfig, tensors: "Iterable[tuple[str, Tensor]]", max_bytes: int) -> str:
    """Write the weights and, if they take more than one file, the index. Returns the dtype of most of them."""
    needed = {fused.name: fused for fused in layout(config)}
    room = sum(len(fused.parts) for fused in needed.values())
    shards: list[list[str]] = []
    sizes: dict[str, int] = {}
    writer: ShardWriter | None = None
    total = 0
    try:
        for name, tensor in tensors:
            fused = needed.pop(name, None)
            if fused is None:
                raise CheckpointError(f"{name} is no parameter of this model, or came twice.")
            if tuple(tensor.shape) != fused.shape:
                raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(fused.shape)}.")
            row = 0
            for part, shape in fused.parts:
                piece = tensor[row : row + shape[0]]
                row += shape[0]
                piece_bytes = piece.numel() * piece.element_size()
                if writer is None or (writer.num_bytes and writer.num_bytes + piece_bytes > max_bytes):
                    if writer is not None:
                        writer.close()
                    shards.append([])
                    writer = ShardWriter(draft / f"shard-{len(shards)}", room_for=room)
                writer.write(exported_name(part, config), piece)
                shards[-1].append(exported_name(part, config))
                total += piece_bytes
            sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.numel()
        if needed:
            raise CheckpointError(f"The model's parameters {listed(list(needed))} did not come.")
    finally:
        if writer is not None:
            writer.close()
    if len(shards) == 1:
        (draft / "shard-1").rename(draft / SINGLE)
    else:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (draft / f"shard-{number}").rename(draft / file)
            weight_map |= dict.fromkeys(names, file)
        _write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return _DTYPE_NAMES[ENCODINGS[max(sizes, key=sizes.__getitem__)]]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
