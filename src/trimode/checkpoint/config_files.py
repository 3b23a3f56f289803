"""A Hugging Face config.json to a ModelConfig, and back.

Keys that a file leaves out take the default that the family's own class would take, so the same file means the same model here
and there. trimode's facts about block decoding, which other families have no words for, ride along in an optional object
`"trimode"`: a converted Llama stays a Llama to everybody else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trimode.errors import CheckpointError, UnsupportedModelError, nearest
from trimode.model.config import ModelConfig, RopeConfig

__all__ = [
    "FAMILIES",
    "check_config",
    "packed_format",
    "read_config",
    "read_generation_defaults",
    "with_trimode_facts",
    "write_config",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family's own configuration class assumes where config.json is silent."""

    architecture: str
    """The class that writes such a checkpoint."""
    kv_heads: int | None
    """None: as many as query heads."""
    head_size: int | None = None
    """None: width / heads."""
    norm_eps: float = 1e-6
    max_positions: int = 32_768
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    has_llama4_scaling: bool = False


_NATIVE = "nemotron_labs_diffusion"

FAMILIES = {
    _NATIVE: Family(
        architecture="NemotronLabsDiffusionModel",
        kv_heads=8,
        head_size=128,
        norm_eps=1e-5,
        max_positions=262_144,
        bos_token_id=1,
        eos_token_id=2,
        has_llama4_scaling=True,
    ),
    "llama": Family(architecture="LlamaForCausalLM", kv_heads=None, max_positions=2048, bos_token_id=1, eos_token_id=2),
    "mistral": Family(
        architecture="MistralForCausalLM",
        kv_heads=8,
        max_positions=131_072,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        kv_heads=8,
        head_size=128,
        norm_eps=1e-5,
        max_positions=262_144,
        bos_token_id=1,
        eos_token_id=2,
        has_llama4_scaling=True,
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", kv_heads=32),
    "qwen3": Family(architecture="Qwen3ForCausalLM", kv_heads=32, head_size=128),
}
"""The `model_type`s that trimode runs."""

_MINISTRAL3_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}

_LARGEST = 1 << 31
"""No size of a model that anybody runs comes near; it keeps a damaged file from asking for a terabyte."""


class _Reader:
    """Typed access to a JSON object whose author is unknown."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def fault(self, key: str, wanted: str) -> CheckpointError:
        got = f"got {self.raw[key]!r}" if key in self.raw else "it is missing"
        return CheckpointError(f"{key} in {self.where} must be {wanted}; {got}.")

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number in range; required unless there is a default."""
        value = self.raw.get(key, default)
        if isinstance(value, float) and value.is_integer():  # some writers give 16384.0
            value = int(value)
        if type(value) is not int or not least <= value < _LARGEST:
            raise self.fault(key, f"a whole number of at least {least}")
        return value

    def optional_count(self, key: str, default: int | None = None, *, least: int = 1) -> int | None:
        return None if self.raw.get(key, default) is None else self.count(key, default, least=least)

    def number(self, key: str, default: float | None = None, *, above: float | None = 0.0) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(key, "a number")
        if above is not None and value <= above:
            raise self.fault(key, f"above {above:g}")
        return float(value)

    def optional_number(self, key: str, *, above: float | None = 0.0) -> float | None:
        return None if self.raw.get(key) is None else self.number(key, above=above)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault(key, "an object")
        return value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """One id, a list of them, or null; negative ids are some writers' word for none."""
        value = self.raw.get(key, default)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in values):
            raise self.fault(key, "an id, a list of ids or null")
        return tuple(item for item in values if item >= 0)


def packed_format(raw: Mapping[str, Any]) -> str | None:
    """The version of trimode's own int8 format that a config.json speaks of; None: of none."""
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) and method.startswith("trimode-int8-") else None


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, where: str) -> ModelConfig:
    """The model that a config.json describes; `generation` is generation_config.json.

    Raises UnsupportedModelError for models that trimode does not run and CheckpointError for values that cannot be.
    """
    outer, raw = raw, _language_half(raw)
    reader = _Reader(raw, where)
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise reader.fault("model_type", "a string")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"{where} is of the model_type {name!r}. trimode runs {known}.{nearest(name, FAMILIES)}"
        )
    if outer.get("quantization_config") and packed_format(outer) is None:
        raise UnsupportedModelError(
            f"{where} describes quantised weights (quantization_config). Use the unquantised checkpoint or a GGUF file."
        )
    family = FAMILIES[name]
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act in {where} is {raw['hidden_act']!r}. trimode runs silu only.")

    heads = reader.count("num_attention_heads")
    width = reader.count("hidden_size")
    head_size = reader.optional_count("head_dim", family.head_size)
    if head_size is None:
        if width % heads:
            raise CheckpointError(
                f"hidden_size in {where} must be a multiple of num_attention_heads, or head_dim given; "
                f"got {width} and {heads}."
            )
        head_size = width // heads
    # Nemotron-Labs-Diffusion's config lists both biases, and its layers are built without them all the same.
    biased = name in ("llama", "qwen3") and reader.flag("attention_bias")
    config = ModelConfig(
        family=name,
        vocab_size=reader.count("vocab_size"),
        width=width,
        mlp_width=reader.count("intermediate_size"),
        num_layers=reader.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=reader.optional_count("num_key_value_heads", family.kv_heads) or heads,
        head_size=head_size,
        norm_eps=reader.number("rms_norm_eps", family.norm_eps),
        rope=_read_rope(reader, family),
        max_positions=_read_max_positions(reader, family),
        tied_head=reader.flag("tie_word_embeddings"),
        qkv_bias=biased or name == "qwen2",
        output_bias=biased,
        mlp_bias=name == "llama" and reader.flag("mlp_bias"),
        qk_norm=name == "qwen3",
        bos_token_id=next(iter(reader.token_ids("bos_token_id", family.bos_token_id)), None),
        eos_token_ids=_read_eos(reader, family, generation or {}),
    )
    if name == _NATIVE:
        mask = reader.optional_count("mask_token_id", -1, least=-1)
        config = replace(
            config,
            mask_token_id=None if mask == -1 else mask,
            block_length=reader.count("block_size", 32),
            trained_for_blocks=True,
        )
    facts = _Reader(outer, where).mapping("trimode") or reader.mapping("trimode")
    config = with_trimode_facts(config, facts, where=where)
    check_config(config, where=where)
    return config


def _language_half(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model inside the config of one that also sees (Ministral 3 is published so)."""
    inner = raw.get("text_config")
    if raw.get("model_type") == "mistral3" and isinstance(inner, dict):
        return {"tie_word_embeddings": raw.get("tie_word_embeddings", False), **inner}
    return raw


def _read_eos(reader: _Reader, family: Family, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends a text: generation_config.json, where chat models list their end of turn, before config.json."""
    if generation.get("eos_token_id") is not None:
        return _Reader(generation, "generation_config.json").token_ids("eos_token_id", None)
    return reader.token_ids("eos_token_id", family.eos_token_id)


def _read_max_positions(reader: _Reader, family: Family) -> int:
    """The longest context, capped at a sliding window.

    A window of n lets position p see the n positions that end with p. Up to n positions that is plain causal attention,
    bit for bit; beyond, trimode would compute something else, so it does not go there.
    """
    longest = reader.count("max_position_embeddings", family.max_positions)
    if family.architecture.startswith("Qwen"):
        window = reader.optional_count("sliding_window", 4096) if reader.flag("use_sliding_window") else None
        layers, full_layers = reader.count("num_hidden_layers"), reader.count("max_window_layers", 28, least=0)
        kinds = reader.raw.get("layer_types")
        slides = "sliding_attention" in kinds if isinstance(kinds, list) else full_layers < layers
        window = window if slides else None
    else:
        window = reader.optional_count("sliding_window", family.sliding_window)
    return longest if window is None else min(longest, window)


def _read_rope(reader: _Reader, family: Family) -> RopeConfig:
    """RoPE in the new style (`rope_parameters`) or the old one (`rope_scaling` beside `rope_theta`)."""
    raw = dict(reader.mapping("rope_scaling") or reader.mapping("rope_parameters"))
    if not raw and family.architecture == FAMILIES["ministral3"].architecture:
        raw = dict(_MINISTRAL3_ROPE)
    if not raw and family.architecture == FAMILIES[_NATIVE].architecture:
        raise reader.fault("rope_parameters", "an object")
    if any(isinstance(value, dict) for value in raw.values()):
        raise UnsupportedModelError(f"{reader.where} gives each kind of layer its own RoPE. trimode runs one for all.")
    raw.setdefault("rope_theta", reader.raw.get("rope_theta", 10_000.0))
    rope = _Reader(raw, f"the RoPE of {reader.where}")
    kind = raw.get("rope_type", raw.get("type")) or "default"
    partial = raw.get("partial_rotary_factor", reader.raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"{reader.where} turns a part of each head only ({partial!r}). trimode turns all.")
    theta = rope.number("rope_theta", above=1.0)
    if kind in ("llama3", "yarn") or family.has_llama4_scaling:
        longest = reader.count("max_position_embeddings", family.max_positions)
        raw.setdefault("original_max_position_embeddings", longest)
        # Beside the RoPE object it takes precedence over the same key inside, as Phi 3 brought it about.
        if "original_max_position_embeddings" in reader.raw:
            raw["original_max_position_embeddings"] = reader.raw["original_max_position_embeddings"]
    llama4 = rope.optional_number("llama_4_scaling_beta", above=None) if family.has_llama4_scaling else None
    original = rope.count("original_max_position_embeddings") if llama4 is not None else None
    match kind:
        case "default":
            return RopeConfig(theta=theta, original_max_positions=original, llama4_beta=llama4)
        case "linear":
            factor = rope.number("factor")
            return RopeConfig(
                theta=theta, kind="linear", factor=factor, original_max_positions=original, llama4_beta=llama4
            )
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if low >= high:
                raise rope.fault("high_freq_factor", f"above low_freq_factor ({low:g})")
            return RopeConfig(
                theta=theta,
                kind="llama3",
                factor=rope.number("factor"),
                original_max_positions=rope.count("original_max_position_embeddings"),
                low_freq_factor=low,
                high_freq_factor=high,
                llama4_beta=llama4,
            )
        case "yarn":
            original = rope.count("original_max_position_embeddings")
            # The file's own factor, even where it is not longest / original: Nemotron-Labs-Diffusion-3B-Base has 0.25.
            factor = reader.count("max_position_embeddings", family.max_positions) / original
            return RopeConfig(
                theta=theta,
                kind="yarn",
                factor=rope.number("factor") if raw.get("factor") is not None else factor,
                original_max_positions=original,
                beta_fast=rope.optional_number("beta_fast", above=None) or 32.0,
                beta_slow=rope.optional_number("beta_slow", above=None) or 1.0,
                mscale=rope.optional_number("mscale", above=None),
                mscale_all_dim=rope.optional_number("mscale_all_dim", above=None),
                attention_factor=rope.optional_number("attention_factor"),
                truncate=rope.flag("truncate", True),
                llama4_beta=llama4,
            )
    raise UnsupportedModelError(
        f"{reader.where} stretches RoPE by {kind!r}. trimode runs default, linear, llama3 and yarn."
    )


_FACTS = {
    "mask_token_id": "an id or null",
    "block_length": "a whole number of at least 1",
    "block_predicts": "'self' or 'next'",
    "known_tokens_are_causal": "true or false",
    "trained_for_blocks": "true or false",
    "adapter_acts_on": "'draft' or 'masks'",
}
"""The keys of the object `"trimode"`."""


def with_trimode_facts(config: ModelConfig, facts: Mapping[str, Any], *, where: str) -> ModelConfig:
    """`config` with what the object `"trimode"` says. Raises CheckpointError naming unknown keys and wrong values."""
    reader = _Reader(facts, f'"trimode" of {where}')
    unknown = sorted(facts.keys() - _FACTS.keys())
    if unknown:
        raise CheckpointError(
            f"{reader.where} has the unknown key {unknown[0]!r}. It knows {', '.join(_FACTS)}."
            f"{nearest(unknown[0], _FACTS)}"
        )
    for key, value in facts.items():
        match key:
            case "mask_token_id":
                fine = value is None or (type(value) is int and value >= 0)
            case "block_length":
                fine = type(value) is int and 1 <= value < _LARGEST
            case "block_predicts":
                fine = value in ("self", "next")
            case "adapter_acts_on":
                fine = value in ("draft", "masks")
            case _:
                fine = isinstance(value, bool)
        if not fine:
            raise reader.fault(key, _FACTS[key])
    return replace(config, **facts)


def check_config(config: ModelConfig, *, where: str) -> None:
    """Raise CheckpointError where sizes contradict one another."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{where} has {config.num_heads} heads, which is not a multiple of its {config.num_kv_heads} key-value heads."
        )
    if config.head_size % 2:
        raise CheckpointError(f"{where} has heads of {config.head_size}; RoPE turns pairs, so it must be even.")
    if config.mask_token_id is not None and config.mask_token_id >= config.vocab_size:
        raise CheckpointError(
            f"{where} has the mask_token_id {config.mask_token_id}, outside its vocabulary of {config.vocab_size}."
        )


def write_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """A config.json that the family's own class reads. Raises CheckpointError for what the family has no word for."""
    if config.family not in FAMILIES:
        raise CheckpointError(f"Cannot write the family {config.family!r}. Known: {', '.join(FAMILIES)}.")
    family = FAMILIES[config.family]
    eos = list(config.eos_token_ids)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope.theta,
        "rope_parameters": _write_rope(config.rope),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.qkv_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": None,
    }
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.family.startswith("qwen"):
        raw["use_sliding_window"] = False
    else:
        raw["sliding_window"] = None
    if config.family == _NATIVE:
        raw["mask_token_id"] = -1 if config.mask_token_id is None else config.mask_token_id
        raw["block_size"] = config.block_length
        raw["dlm_paradigm"] = "bidirectional"
    elif config.family not in ("llama", "qwen3"):
        del raw["attention_bias"]

    # Reading it back shows what the family's words cannot say: ours go into "trimode", the rest is an error.
    plain = read_config(raw, where="the exported config")
    different = [field.name for field in fields(config) if getattr(plain, field.name) != getattr(config, field.name)]
    lost = [name for name in different if name not in _FACTS]
    if lost:
        raise CheckpointError(
            f"A {config.family} checkpoint cannot say {', '.join(f'{name}={getattr(config, name)!r}' for name in lost)}."
        )
    if different:
        raw["trimode"] = {name: getattr(config, name) for name in different}
    return raw


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.original_max_positions is not None:
        raw["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        raw |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim, "attention_factor": rope.attention_factor}
    raw["llama_4_scaling_beta"] = rope.llama4_beta
    return {key: value for key, value in raw.items() if value is not None}


def read_generation_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings that a generation_config.json recommends, by trimode's names.

    As in transformers the settings mean nothing unless `do_sample` is true; an explicit false is a wish for greedy text.
    """
    reader = _Reader(generation, "generation_config.json")
    if generation.get("do_sample") is None:
        return {}
    if not reader.flag("do_sample"):
        return {"temperature": 0.0}
    found: dict[str, Any] = {}
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if generation.get(key) is not None:
            found[key] = reader.number(key, above=None)
    if generation.get("top_k"):  # 0 is a way to say off
        found["top_k"] = reader.count("top_k")
    return found
