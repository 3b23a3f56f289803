"""Foreign tensor names and trimode's own: what each parameter is made of, and what the same thing is called elsewhere.

The idea: trimode fuses what is multiplied with the same input (queries, keys and values; gate and up), so one parameter of ours
is a stack of rows of several tensors of theirs. `layout` says which. The parts go by their Hugging Face names without prefix,
for instance `layers.0.self_attn.q_proj.weight`; other namings are translated to those.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimode.checkpoint.stored import BLOCKS, PLAIN, StoredTensor, listed
from trimode.errors import CheckpointError, UnsupportedModelError
from trimode.model.config import ModelConfig

__all__ = ["ADAPTED", "Fused", "bare_name", "check_tensors", "exported_name", "gguf_name", "layout", "part_sizes"]

HEAD = "head.weight"
"""The output head goes by this name among the parts; `lm_head.weight` and `diffusion_head.weight` mean it."""

ADAPTED = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""Linear maps that an adapter may act on: Hugging Face's name to ours."""

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "encoder.", "model.", "")

_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq$|rope_freqs\.weight$")
"""Buffers that old checkpoints carry; frequencies follow from the config."""

_OF_THE_EYES = re.compile(r"(model\.)?(vision_tower|vision_encoder|multi_modal_projector)\..*")
"""The picture half of a checkpoint whose language half we run."""


@dataclass(frozen=True, slots=True)
class Fused:
    """One parameter of trimode: the parts' rows, one under the other."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each part."""


def part_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map of a layer, by Hugging Face's name."""
    return {theirs: config.part_sizes[ours] for theirs, ours in ADAPTED.items()}


def layout(config: ModelConfig) -> tuple[Fused, ...]:
    """Every parameter in the order of use, the embedding first."""
    V, D, K = config.vocab_size, config.width, config.head_size
    sizes = part_sizes(config)
    found = [_alone("embedding.weight", "embed_tokens.weight", (V, D))]

    def linear(own: str, theirs: str, maps: tuple[str, ...], bias: bool) -> None:
        weights = tuple((f"{theirs}.{name}.weight", (sizes[name][1], sizes[name][0])) for name in maps)
        rows = sum(shape[0] for _, shape in weights)
        found.append(Fused(f"{own}.weight", (rows, weights[0][1][1]), weights))
        if bias:
            biases = tuple((f"{theirs}.{name}.bias", (sizes[name][1],)) for name in maps)
            found.append(Fused(f"{own}.bias", (rows,), biases))

    for i in range(config.num_layers):
        own = theirs = f"layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        found.append(_alone(f"{own}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (D,)))
        linear(f"{own}.qkv", attention, ("q_proj", "k_proj", "v_proj"), config.qkv_bias)
        if config.qk_norm:
            found.append(_alone(f"{own}.q_norm.weight", f"{attention}.q_norm.weight", (K,)))
            found.append(_alone(f"{own}.k_norm.weight", f"{attention}.k_norm.weight", (K,)))
        linear(f"{own}.output", attention, ("o_proj",), config.output_bias)
        found.append(_alone(f"{own}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", (D,)))
        linear(f"{own}.gate_up", mlp, ("gate_proj", "up_proj"), config.mlp_bias)
        linear(f"{own}.down", mlp, ("down_proj",), config.mlp_bias)
    found.append(_alone("norm.weight", "norm.weight", (D,)))
    if not config.tied_head:
        found.append(_alone("head.weight", HEAD, (V, D)))
    return tuple(found)


def _alone(own: str, theirs: str, shape: tuple[int, ...]) -> Fused:
    return Fused(own, shape, ((theirs, shape),))


def bare_name(stored: str) -> str:
    """The part that a Hugging Face tensor is, whichever wrapper class saved it."""
    prefix = next(prefix for prefix in _PREFIXES if stored.startswith(prefix))
    bare = stored[len(prefix) :]
    return HEAD if bare in ("lm_head.weight", "diffusion_head.weight") else bare


def exported_name(part: str, config: ModelConfig) -> str:
    """The name under which the family's own class looks for a part."""
    native = config.family == "nemotron_labs_diffusion"
    if part == HEAD:
        return "diffusion_head.weight" if native else "lm_head.weight"
    return f"{'encoder' if native else 'model'}.{part}"


_GGUF_PLACES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_ENDS = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight", "output.weight": HEAD}


def gguf_name(stored: str) -> str:
    """The part that a GGUF tensor is; the name itself if it is none."""
    if stored in _GGUF_ENDS:
        return _GGUF_ENDS[stored]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match is None or match[2] not in _GGUF_PLACES:
        return stored
    return f"layers.{match[1]}.{_GGUF_PLACES[match[2]]}.{match[3]}"


def check_tensors(
    config: ModelConfig, stored: Mapping[str, StoredTensor], translate: Callable[[str], str], where: str
) -> dict[str, StoredTensor]:
    """The stored tensors by part, once it is sure that they are exactly those that `config` needs."""
    if config.num_layers > len(stored):  # before a layout of a billion layers is made
        raise CheckpointError(f"{where} has {len(stored)} tensors, too few for {config.num_layers} layers.")
    needed = dict(part for fused in layout(config) for part in fused.parts)
    found: dict[str, StoredTensor] = {}
    extra = []
    for name, tensor in stored.items():
        part = translate(name)
        if part in found:
            raise CheckpointError(f"{where} holds {found[part].name} and {name}, which mean the same.")
        if part in needed:
            found[part] = tensor
        elif not (_HARMLESS.match(name) or _OF_THE_EYES.match(name) or (part == HEAD and config.tied_head)):
            extra.append(name)
    missing = [part for part in needed if part not in found]
    if missing:
        raise CheckpointError(f"{where} lacks {_count(missing)}: {listed(_as_stored(missing, found, translate))}.")
    if extra:
        raise CheckpointError(f"{where} holds {_count(extra)} that a {config.family} lacks: {listed(extra)}.")
    wrong = [
        f"{found[part].name} is {list(found[part].shape)}, expected {list(shape)}"
        for part, shape in needed.items()
        if found[part].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{where} has {_count(wrong)} of the wrong shape: {listed(wrong)}.")
    for tensor in found.values():
        if not tensor.readable:
            raise UnsupportedModelError(
                f"{tensor.name} of {where} is stored as {tensor.encoding}, which trimode does not read. "
                f"It reads {', '.join((*PLAIN, *BLOCKS))}."
            )
    return found


def _count(names: list[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"


def _as_stored(missing: list[str], found: Mapping[str, StoredTensor], translate: Callable[[str], str]) -> list[str]:
    """Missing parts under the names that this file would use, as far as its other tensors tell."""
    if translate is gguf_name:
        places = {theirs: own for own, theirs in (_GGUF_PLACES | _GGUF_ENDS).items()}
        return [_to_gguf(part, places) for part in missing]
    layered = (tensor.name.removesuffix(part) for part, tensor in found.items() if part != HEAD)
    prefix = next((prefix for prefix in layered if prefix), "")
    return [("lm_head.weight" if part == HEAD else prefix + part) for part in missing]


def _to_gguf(part: str, places: Mapping[str, str]) -> str:
    if part in places:
        return places[part]
    _, layer, place = part.split(".", 2)
    place, kind = place.rsplit(".", 1)
    return f"blk.{layer}.{places[place]}.{kind}"
