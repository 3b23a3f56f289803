"""Adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`.

Headers are checked when the checkpoint is opened; the factors are read when somebody asks for them, in the dtype they are
stored in.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.checkpoint.names import ADAPTED, part_sizes
from trimode.checkpoint.safetensors_files import read_header, read_json
from trimode.checkpoint.safetensors_writer import ShardWriter
from trimode.checkpoint.stored import StoredTensor, listed
from trimode.errors import CheckpointError, UnsupportedModelError
from trimode.model.config import ModelConfig

if TYPE_CHECKING:
    from trimode.model.lora import Lora

__all__ = ["StoredAdapter", "open_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUCCESSOR = "successor.safetensors"
"""Beside PEFT's files: what lets drafts know the draft before them (`inner` [R, 2 D] and `outer` [D, R])."""

BASE = "base_fingerprint"
"""The key of the object `"trimode"` that tells which model the adapter belongs to."""
TOKENS = "trainable_token_indices"

_EMBEDDING = re.compile(r"base_model\.model\.(?:.+\.)?embed_tokens\.token_adapter\.trainable_tokens_delta")
"""PEFT's name for embeddings that replace those of some tokens. A delta in name only: they are whole rows."""
_FACTOR = re.compile(
    r"base_model\.model\.(?:.+\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """A checked adapter, not yet read."""

    rank: int
    scale: float
    factors: Mapping[tuple[int, str], tuple[StoredTensor, StoredTensor]]
    """A: [rank, inputs] and B: [outputs, rank], by layer and part in trimode's words."""
    facts: Mapping[str, Any]
    """Its own object `"trimode"`: what the checkpoint becomes with this adapter."""
    base: Mapping[str, Any] | None = None
    """Fingerprint of the model that it was trained on, if it says so."""
    mask_embedding: StoredTensor | None = None
    """[1, D]: what masks are embedded as, in place of the mask token's own row."""
    successor: tuple[StoredTensor, StoredTensor] | None = None
    """Inner [R, 2 D] and outer [D, R]."""

    @property
    def parts(self) -> list[str]:
        found = {part for _, part in self.factors}
        return [part for part in ADAPTED.values() if part in found]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self._tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._tensors())

    def _tensors(self) -> list[StoredTensor]:
        factors = [tensor for pair in self.factors.values() for tensor in pair]
        return [*factors, *([] if self.mask_embedding is None else [self.mask_embedding]), *(self.successor or ())]

    def read(self) -> "Lora":
        import torch

        from trimode.model.lora import Lora
        from trimode.model.successor import Successor

        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

        def load(stored: StoredTensor):
            tensor = torch.empty(stored.shape, dtype=dtypes[stored.encoding])
            stored.read_into(tensor)
            return tensor

        mask_embedding = None if self.mask_embedding is None else load(self.mask_embedding)[0]
        successor = None if self.successor is None else Successor(*map(load, self.successor))
        factors = {place: (load(A), load(B)) for place, (A, B) in self.factors.items()}
        return Lora(factors, self.scale, mask_embedding, successor)


def open_adapter(directory: Path, config: ModelConfig) -> StoredAdapter:
    """Check an adapter against the model. Raises CheckpointError naming what is missing, extra or of the wrong shape."""
    where = directory / CONFIG
    raw = read_json(where)
    _refuse_other_kinds(raw, where)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"r in {where} must be a whole number of at least 1; got {rank!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha in {where} must be a number; got {alpha!r}.")
    facts = raw.get("trimode") or {}
    if not isinstance(facts, dict):
        raise CheckpointError(f'"trimode" in {where} must be an object; got {facts!r}.')
    base = facts.get(BASE)
    if base is not None and not isinstance(base, dict):
        raise CheckpointError(f"{BASE} in {where} must be an object; got {base!r}.")
    facts = {key: value for key, value in facts.items() if key != BASE}

    path = directory / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{directory} holds {CONFIG} but no {WEIGHTS}.")
    found: dict[tuple[int, str, str], StoredTensor] = {}
    extra = []
    mask_embedding = None
    for name, tensor in read_header(path).items():
        if _EMBEDDING.fullmatch(name):
            mask_embedding = tensor
            continue
        match = _FACTOR.fullmatch(name)
        if match is None or match[2] not in ADAPTED or int(match[1]) >= config.num_layers:
            extra.append(name)
            continue
        place = (int(match[1]), match[2], match[3])
        if place in found:
            raise CheckpointError(f"{path} holds {found[place].name} and {name}, which mean the same.")
        found[place] = tensor
    if extra:
        raise CheckpointError(f"{path} holds tensors that do not adapt this model: {listed(extra)}.")
    needed = _needed(raw, found, config, where)
    missing = [f"layers.{i}.{name}.lora_{AB}" for i, name, AB in needed if (i, name, AB) not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}.")
    unnamed = [found[place].name for place in found if place not in set(needed)]
    if unnamed:
        raise CheckpointError(f"{path} holds tensors that {CONFIG} does not announce: {listed(unnamed)}.")

    sizes = part_sizes(config)
    for (_, name, AB), tensor in found.items():
        inputs, outputs = sizes[name]
        expected = (rank, inputs) if AB == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise CheckpointError(f"{tensor.name} of {path} is {list(tensor.shape)}, expected {list(expected)}.")
        if not tensor.readable:
            raise UnsupportedModelError(f"{tensor.name} of {path} is stored as {tensor.encoding}, not as numbers.")
    _check_embedding(raw, mask_embedding, config, where)
    scale = alpha / math.sqrt(rank) if raw.get("use_rslora") else alpha / rank
    places = sorted(
        {(layer, name) for layer, name, _ in found}, key=lambda place: (place[0], list(ADAPTED).index(place[1]))
    )
    factors = {(i, ADAPTED[name]): (found[i, name, "A"], found[i, name, "B"]) for i, name in places}
    return StoredAdapter(
        rank=rank,
        scale=scale,
        factors=factors,
        facts=facts,
        base=base,
        mask_embedding=mask_embedding,
        successor=_open_successor(directory / SUCCESSOR, config),
    )


def _open_successor(path: Path, config: ModelConfig) -> tuple[StoredTensor, StoredTensor] | None:
    if not path.exists():
        return None
    tensors = read_header(path)
    if set(tensors) != {"inner", "outer"}:
        raise CheckpointError(f"{path} must hold inner and outer; it holds {listed(sorted(tensors)) or 'nothing'}.")
    inner, outer = tensors["inner"], tensors["outer"]
    D, R = config.width, inner.shape[0] if inner.shape else 0
    if inner.shape != (R, 2 * D) or outer.shape != (D, R) or not R or not inner.readable or not outer.readable:
        raise CheckpointError(
            f"{path} holds inner {list(inner.shape)} and outer {list(outer.shape)}; numbers in [R, {2 * D}] and [{D}, R] are expected."
        )
    return inner, outer


def _check_embedding(raw: Mapping[str, Any], embedding: StoredTensor | None, config: ModelConfig, where: Path) -> None:
    tokens = raw.get(TOKENS)
    if isinstance(tokens, dict):
        tokens = tokens.get("embed_tokens") if len(tokens) == 1 else tokens
    if not tokens and embedding is None:
        return
    if tokens != [config.mask_token_id]:
        raise UnsupportedModelError(
            f"{TOKENS} in {where} is {tokens!r}. trimode runs an embedding of the mask token ({config.mask_token_id}) only."
        )
    if embedding is None:
        raise CheckpointError(f"{where} announces an embedding ({TOKENS}), and {WEIGHTS} holds none.")
    if embedding.shape != (1, config.width) or not embedding.readable:
        raise CheckpointError(
            f"{embedding.name} of {where.parent / WEIGHTS} is {list(embedding.shape)} as {embedding.encoding}, "
            f"expected numbers in [1, {config.width}]."
        )


def _refuse_other_kinds(raw: Mapping[str, Any], where: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{where} is of the peft_type {raw.get('peft_type')!r}. trimode runs LORA.")
    if raw.get("bias", "none") != "none":
        raise UnsupportedModelError(f"{where} trains biases (bias={raw['bias']!r}), which trimode does not run.")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias"):
        if raw.get(key):
            raise UnsupportedModelError(f"{where} sets {key}, which trimode does not run.")


def _needed(
    raw: Mapping[str, Any], found: Mapping[tuple[int, str, str], Any], config: ModelConfig, where: Path
) -> list[tuple[int, str, str]]:
    """Every factor that must be there: for each announced map in each layer; where it is announced by a pattern, the
    other half of each that is there."""
    targets = raw.get("target_modules")
    if isinstance(targets, str) or raw.get("layers_to_transform") is not None:
        return [(i, name, AB) for i, name in sorted({place[:2] for place in found}) for AB in "AB"]
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"target_modules in {where} must list the adapted maps; got {targets!r}.")
    names = [target.rsplit(".", 1)[-1] for target in targets]
    unknown = [name for name in names if name not in ADAPTED]
    if unknown:
        raise UnsupportedModelError(f"{where} adapts {listed(unknown)}. trimode adapts {', '.join(ADAPTED)}.")
    return [(i, name, AB) for i in range(config.num_layers) for name in dict.fromkeys(names) for AB in "AB"]


def save_adapter(
    directory: Path, config: ModelConfig, adapter: "Lora", *, extra: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter as PEFT would, in its own dtype; `extra` adds keys to its config. The directory must exist."""
    ranks = {A.shape[0] for A, _ in adapter.factors.values()}
    if len(ranks) != 1:
        raise CheckpointError(f"An adapter has one rank throughout; got {sorted(ranks)}.")
    rank = ranks.pop()
    ours = {own: theirs for theirs, own in ADAPTED.items()}
    sizes = part_sizes(config)
    backbone = "encoder" if config.family == "nemotron_labs_diffusion" else "model"
    with ShardWriter(directory / WEIGHTS, room_for=2 * len(adapter.factors) + 1) as writer:
        if adapter.mask_embedding is not None:
            name = f"base_model.model.{backbone}.embed_tokens.token_adapter.trainable_tokens_delta"
            writer.write(name, adapter.mask_embedding[None].contiguous())
        for (layer, part), (A, B) in adapter.factors.items():
            name = ours[part]
            inputs, outputs = sizes[name]
            if A.shape != (rank, inputs) or B.shape != (outputs, rank) or not 0 <= layer < config.num_layers:
                raise CheckpointError(f"The adapter's factors for {part} of layer {layer} do not fit this model.")
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            place = f"base_model.model.{backbone}.layers.{layer}.{block}.{name}"
            writer.write(f"{place}.lora_A.weight", A)
            writer.write(f"{place}.lora_B.weight", B)
    if adapter.successor is not None:
        with ShardWriter(directory / SUCCESSOR, room_for=2) as writer:
            writer.write("inner", adapter.successor.inner.contiguous())
            writer.write("outer", adapter.successor.outer.contiguous())
    layers = sorted({layer for layer, _ in adapter.factors})
    alpha = adapter.scale * rank
    raw = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": [name for name, part in ADAPTED.items() if part in adapter.parts],
        "layers_to_transform": None if len(layers) == config.num_layers else layers,
        "bias": "none",
        "inference_mode": True,
    }
    if adapter.mask_embedding is not None:
        raw[TOKENS] = [config.mask_token_id]
    clash = sorted((extra or {}).keys() & raw.keys())
    if clash:
        raise CheckpointError(f"The extra key {clash[0]!r} of the adapter's config is already taken.")
    (directory / CONFIG).write_text(json.dumps(raw | dict(extra or {}), indent=2) + "\n")
