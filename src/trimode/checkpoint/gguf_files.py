"""GGUF files: metadata, where the tensors lie, and the ModelConfig that the metadata mean.

The header is parsed here, bounds checked, because the `gguf` package's reader takes 2.5 s and 160 MB for a vocabulary of 49
thousand tokens (it makes several arrays of each string), and this takes a tenth of a second. Its dequantisation is used.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimode.checkpoint.config_files import check_config
from trimode.checkpoint.stored import BLOCKS, PLAIN, StoredTensor, listed
from trimode.errors import CheckpointError, UnsupportedModelError
from trimode.model.config import ModelConfig, RopeConfig

__all__ = ["ARCHITECTURES", "gguf_config", "read_gguf"]

ARCHITECTURES = {"llama": "llama", "mistral3": "ministral3", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` to the family of the same shape."""

_INTERLEAVED = ("llama", "mistral3")
"""Architectures whose query and key rows llama.cpp's converter interleaves, since its RoPE there turns neighbours."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_ENCODINGS = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""ggml's numbers for the encodings."""


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.at = 0

    def take(self, num_bytes: int) -> int:
        """Step over `num_bytes` and return where they start."""
        start = self.at
        if num_bytes > self.size - start:
            raise CheckpointError(f"{self.path} is cut off or damaged: its header runs past the end of the file.")
        self.at = start + num_bytes
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a text in its header is not UTF-8.") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise CheckpointError(f"{self.path} is damaged: its header has a value of the unknown kind {kind}.")
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            item = struct.calcsize("<" + _SCALARS[kind])
            start = self.take(length * item)
            return list(struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.data, start))
        if length * 8 > self.size - self.at:  # each string or array starts with a length of eight bytes
            raise CheckpointError(f"{self.path} is cut off or damaged: a list in its header has {length} items.")
        return self.strings(length) if kind == _STRING else [self.value(kind, depth + 1) for _ in range(length)]

    def strings(self, count: int) -> list[str]:
        """`string` unrolled: vocabularies and merges are nearly all of a header."""
        data, at, size, unpack = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > size:
                    raise CheckpointError(f"{self.path} is cut off or damaged: a text in its header is too long.")
                found.append(data[start:at].decode())
        except struct.error as error:
            raise CheckpointError(f"{self.path} is cut off: its header runs past the end of the file.") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a text in its header is not UTF-8.") from error
        self.at = at
        return found


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata as a plain dict, and every tensor by its name in the file. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(_Cursor(data, path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    path = cursor.path
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        what = "big-endian" if swapped else f"of version {version}"
        raise UnsupportedModelError(f"{path} is {what}. trimode reads little-endian GGUF of version 2 or 3.")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path} is damaged: its header repeats {key}.")
        metadata[key] = cursor.value(cursor.scalar("I"))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path} is damaged: general.alignment must be a power of two; got {alignment!r}.")
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, shape, encoding, offset in sorted(entries, key=lambda entry: entry[3]):
        num_bytes = _num_bytes(path, name, shape, encoding)
        if name in tensors:
            raise CheckpointError(f"{path} is damaged: its header repeats the tensor {name}.")
        if offset % alignment or offset < end:
            raise CheckpointError(f"{path} is damaged: {name} starts inside another tensor or out of line.")
        end = offset + num_bytes
        if start + end > cursor.size:
            raise CheckpointError(f"{path} is cut off: {name} ends at byte {start + end}, the file has {cursor.size}.")
        tensors[name] = StoredTensor(path, name, start + offset, num_bytes, shape, encoding)
    return metadata, tensors


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if num_dimensions > 4:
        raise CheckpointError(f"{cursor.path} is damaged: {name} has {num_dimensions} dimensions.")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))[::-1]  # ggml names the fastest axis first
    number = cursor.scalar("I")
    return name, shape, _ENCODINGS.get(number, f"encoding {number}"), cursor.scalar("Q")


def _num_bytes(path: Path, name: str, shape: tuple[int, ...], encoding: str) -> int:
    """Bytes of a tensor; 0 for encodings that are listed but not read."""
    if encoding in PLAIN:
        return math.prod(shape) * PLAIN[encoding]
    if encoding not in BLOCKS:
        return 0
    numbers, block_bytes = BLOCKS[encoding]
    if not shape or shape[-1] % numbers:
        raise CheckpointError(f"{path} is damaged: {name} {list(shape)} is not a whole number of {encoding} blocks.")
    return math.prod(shape) // numbers * block_bytes


class _Facts:
    """Typed access to the metadata of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, where: str) -> None:
        self.metadata = metadata
        self.prefix = prefix
        self.where = where

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required unless there is a default."""
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # given layer by layer, all the same
        elif isinstance(value, list):
            raise UnsupportedModelError(f"{self.where} has layers that differ in {key}. trimode runs equal layers.")
        if value is None:
            raise CheckpointError(f"{self.where} lacks {self.prefix}.{key}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{self.prefix}.{key} of {self.where} must be a number above 0; got {value!r}.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value >= 1 << 31:
            raise CheckpointError(f"{self.prefix}.{key} of {self.where} must be a whole number; got {value!r}.")
        return int(value)

    def has(self, key: str) -> bool:
        return self.metadata.get(f"{self.prefix}.{key}") is not None


def gguf_config(
    metadata: Mapping[str, Any], tensors: dict[str, StoredTensor], *, where: str
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The model, and its tensors marked where they are interleaved.

    Raises UnsupportedModelError naming what trimode does not run, and CheckpointError for contradictions.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where} is of the architecture {architecture!r}. trimode runs {', '.join(ARCHITECTURES)} from GGUF."
        )
    facts = _Facts(metadata, architecture, where)
    if facts.has("expert_count") and metadata[f"{architecture}.expert_count"] != 0:
        raise UnsupportedModelError(f"{where} is a mixture of experts, which trimode does not run.")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{where} lacks the tensor token_embd.weight.")

    width, heads = facts.count("embedding_length"), facts.count("attention.head_count")
    head_size = facts.count("attention.key_length", width // heads or None)
    if facts.count("attention.value_length", head_size) != head_size:
        raise UnsupportedModelError(f"{where} has values of another size than keys, which trimode does not run.")
    if facts.count("rope.dimension_count", head_size) != head_size:
        raise UnsupportedModelError(f"{where} turns a part of each head only. trimode turns all.")
    kv_heads = facts.count("attention.head_count_kv", heads)
    longest = facts.count("context_length")
    if facts.has("attention.sliding_window"):
        longest = min(longest, facts.count("attention.sliding_window"))  # as in config_files: up to there it is causal

    config = ModelConfig(
        family=ARCHITECTURES[architecture],
        vocab_size=embedding.shape[0],
        width=width,
        mlp_width=facts.count("feed_forward_length"),
        num_layers=facts.count("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(facts, tensors, head_size),
        max_positions=longest,
        tied_head="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=architecture == "qwen3",
        bos_token_id=_token_id(metadata, "bos", where),
        eos_token_ids=tuple(id for id in (_token_id(metadata, "eos", where),) if id is not None),
    )
    check_config(config, where=where)
    if architecture in _INTERLEAVED:
        tensors = {name: _marked(tensor, heads, kv_heads) for name, tensor in tensors.items()}
    return config, tensors


def _token_id(metadata: Mapping[str, Any], role: str, where: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if value is not None and type(value) is not int:
        raise CheckpointError(f"tokenizer.ggml.{role}_token_id of {where} must be an id; got {value!r}.")
    return None if value is None or value < 0 or value == 0xFFFFFFFF else value  # the last is -1 as unsigned


def _marked(tensor: StoredTensor, heads: int, kv_heads: int) -> StoredTensor:
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
    if match is None:
        return tensor
    place = (tensor.path, tensor.name, tensor.offset, tensor.num_bytes, tensor.shape, tensor.encoding)
    return StoredTensor(*place, interleaved_heads=heads if match[1] == "q" else kv_heads)


def _read_rope(facts: _Facts, tensors: Mapping[str, StoredTensor], head_size: int) -> RopeConfig:
    theta = facts.number("rope.freq_base", 10_000.0)
    if theta <= 1:
        raise CheckpointError(f"{facts.prefix}.rope.freq_base of {facts.where} must be above 1; got {theta!r}.")
    kind = facts.metadata.get(f"{facts.prefix}.rope.scaling.type", "linear")
    factor = facts.number("rope.scaling.factor", 1.0)
    original = facts.count("rope.scaling.original_context_length", facts.count("context_length"))
    llama4 = facts.number("attention.temperature_scale") if facts.has("attention.temperature_scale") else None
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        if facts.number(key, 1.0) != 1.0:
            raise UnsupportedModelError(f"{facts.where} sets {key}, which trimode does not know how to follow.")
    shared: dict[str, Any] = {"theta": theta, "llama4_beta": llama4}
    if llama4 is not None:
        shared["original_max_positions"] = original
    divisors = tensors.get("rope_freqs.weight")
    if divisors is not None:
        if kind not in ("linear", "none") or factor != 1.0:
            raise UnsupportedModelError(f"{facts.where} stretches RoPE twice: rope_freqs.weight and {kind}.")
        return _llama3_rope(facts, divisors, theta, head_size)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(**shared)
    if kind == "linear":
        return RopeConfig(kind="linear", factor=factor, **shared)
    if kind != "yarn":
        raise UnsupportedModelError(f"{facts.where} stretches RoPE by {kind!r}. trimode runs linear, yarn and llama3.")
    # The scale on cos and sin is mscale(1) / mscale(log multiplier); without one it is the plain mscale(1).
    log_multiplier = facts.has("rope.scaling.yarn_log_multiplier")
    log_multiplier = log_multiplier and facts.metadata[f"{facts.prefix}.rope.scaling.yarn_log_multiplier"] != 0
    return RopeConfig(
        kind="yarn",
        factor=factor,
        beta_fast=facts.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=facts.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=1.0 if log_multiplier else None,
        mscale_all_dim=facts.number("rope.scaling.yarn_log_multiplier") if log_multiplier else None,
        **{**shared, "original_max_positions": original},
    )


def _llama3_rope(facts: _Facts, stored: StoredTensor, theta: float, head_size: int) -> RopeConfig:
    """Llama 3's stretch from the table of divisors that GGUF keeps instead of its parameters.

    A frequency f is divided by d with 1/d = (1 - s)/factor + s, where s is f * original/(2 pi) less low, over high - low,
    clamped to [0, 1]. Scaling low, high and original together changes nothing, so low = 1 may be assumed, as it is in every
    published model; what is left are the largest divisor and a line through the points between.
    """
    if stored.encoding != "F32" or stored.shape != (head_size // 2,):
        raise CheckpointError(f"rope_freqs.weight of {facts.where} must hold {head_size // 2} float32 numbers.")
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        divisors = struct.unpack(f"<{head_size // 2}f", file.read(stored.num_bytes))
    if not all(math.isfinite(d) and d >= 1 for d in divisors):
        raise CheckpointError(f"rope_freqs.weight of {facts.where} must hold divisors of at least 1.")
    if max(divisors) == 1.0:
        return RopeConfig(theta=theta)
    factor = max(divisors)
    frequencies = [theta ** (-2 * i / head_size) for i in range(head_size // 2)]

    def divisor(frequency: float, high: float, original: int) -> float:
        smooth = min(max((original * frequency / (2 * math.pi) - 1) / (high - 1), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    # First the values in use, which few and rounded points cannot be told from others; then the line.
    candidates = [(4.0, 1 << power) for power in range(4, 21)]
    between = [(f, (1 / d - 1 / factor) / (1 - 1 / factor)) for f, d in zip(frequencies, divisors, strict=True)]
    between = [(f, s) for f, s in between if 1e-4 < s < 1 - 1e-4]
    if len(between) >= 2:
        (f0, s0), (f1, s1) = between[0], between[-1]
        slope = (s1 - s0) / (f1 - f0)
        below = slope * f0 - s0  # low / (high - low)
        if slope > 0 and below > 0:
            candidates.append((1 + 1 / below, round(slope * 2 * math.pi / below)))
    for high, original in candidates:
        expected = [divisor(f, high, original) for f in frequencies]
        if all(abs(a / b - 1) < 1e-5 for a, b in zip(divisors, expected, strict=True)):
            return RopeConfig(
                theta=theta,
                kind="llama3",
                factor=factor,
                original_max_positions=original,
                low_freq_factor=1.0,
                high_freq_factor=high,
            )
    shown = listed([f"{d:g}" for d in divisors])
    raise UnsupportedModelError(f"{facts.where} divides RoPE's frequencies by {shown}, which is not Llama 3's rule.")
