"""Tiny worlds: random models small enough to be run thousands of times."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimode.decoding.interface import Choice
from trimode.model.config import ModelConfig, RopeConfig
from trimode.model.lora import Lora
from trimode.model.successor import Successor
from trimode.model.transformer import Transformer

MASK = 3
EOS = 2


def tiny_config(**changes) -> ModelConfig:
    """Two layers, grouped queries, 40 tokens."""
    values = {
        "family": "nemotron_labs_diffusion",
        "vocab_size": 40,
        "width": 32,
        "mlp_width": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "rope": RopeConfig(theta=10_000.0),
        "max_positions": 512,
        "eos_token_ids": (EOS,),
        "bos_token_id": 1,
        "mask_token_id": MASK,
        "block_length": 4,
        "trained_for_blocks": True,
    }
    return ModelConfig(**{**values, **changes})


def random_tensors(config: ModelConfig, seed: int = 0, scale: float = 0.35) -> list[tuple[str, torch.Tensor]]:
    """Weights large enough that arg-maxima are far from ties."""
    random = torch.Generator().manual_seed(seed)
    skeleton = Transformer(config)
    tensors = []
    for name, parameter in skeleton.named_parameters():
        tensor = torch.randn(parameter.shape, generator=random) * scale
        if "norm" in name:
            tensor = 1 + 0.2 * tensor
        tensors.append((name, tensor))
    return tensors


def random_transformer(config: ModelConfig, seed: int = 0, *, pack: bool = True, scale: float = 0.35) -> Transformer:
    """A model with random weights."""
    transformer = Transformer(config)
    transformer.load(random_tensors(config, seed, scale), pack=pack)
    return transformer.eval()


def random_lora(
    config: ModelConfig, parts=("output",), rank: int = 3, seed: int = 1, scale: float = 2.0, successor: int = 0
) -> Lora:
    """An adapter that changes things, perhaps with a successor of this inner width."""
    random = torch.Generator().manual_seed(seed)
    D, K, H, G = config.width, config.head_size, config.num_heads, config.num_kv_heads
    sizes = {
        "query": (D, H * K),
        "key": (D, G * K),
        "value": (D, G * K),
        "output": (H * K, D),
        "gate": (D, config.mlp_width),
        "up": (D, config.mlp_width),
        "down": (config.mlp_width, D),
    }
    factors = {}
    for layer in range(config.num_layers):
        for part in parts:
            inputs, outputs = sizes[part]
            factors[layer, part] = (
                torch.randn(rank, inputs, generator=random) * 0.2,
                torch.randn(outputs, rank, generator=random) * 0.2,
            )
    after = None
    if successor:
        inner = torch.randn(successor, 2 * D, generator=random)
        after = Successor(inner * 0.5, torch.randn(D, successor, generator=random))
    return Lora(factors, scale, successor=after)


def tiny_model(
    seed: int = 0, *, lora: Lora | None = None, attention="sdpa", weight_scale: float = 0.35, ngrams=None, **changes
):
    """A LanguageModel without a tokenizer."""
    from trimode.engine.language_model import LanguageModel

    config = tiny_config(**changes)
    transformer = random_transformer(config, seed, scale=weight_scale)
    return LanguageModel("tiny", transformer, adapter=lora, attention=attention, ngrams=ngrams)


def native_forward(config, tensors, *, precision="float32", lora=None, threads=1, kernels=None):
    """The native engine over these weights. Of int8: "u4" has matrices that come in GGUF's Q4_1, "s8" what processors with tiles have,
    "mixed" some of each kind."""
    from trimode.model.native import BLOCKS, NativeForward, new_matrix

    mixed = {"qkv": "u4", "output": "bfloat16", "gate_up": "s8", "down": "float32"}

    def packed(name, tensor):
        if tensor.dim() == 1:
            return tensor.numpy()
        kind = "u8" if precision == "int8" else precision
        if precision == "mixed":
            kind = next((kind for part, kind in mixed.items() if f".{part}." in name), "u8")
        matrix = new_matrix(kind, *tensor.shape)
        if precision == "u4":
            from gguf import GGMLQuantizationType, quants

            raw = quants.quantize(tensor.numpy(), GGMLQuantizationType.Q4_1)
            matrix.pack_blocks(BLOCKS["Q4_1"], list(range(len(tensor))), raw.tobytes())
        else:
            matrix.pack_floats(0, tensor.numpy())
        return matrix

    kept = "int8" if precision in ("u4", "s8", "mixed") else precision
    forward = NativeForward(config, precision=kept, threads=threads, kernels=kernels)
    forward.load(
        [(name, packed(name, tensor)) for name, tensor in tensors if not (config.tied_head and name == "head.weight")]
    )
    if lora is not None:
        forward.set_adapter(lora)
    return forward


def as_packed(lora, kind):
    """The numbers that are left of an adapter in the native engine's int8."""
    from trimode.model.native import new_matrix

    def rounded(weight):
        matrix = new_matrix(kind, *weight.shape)
        matrix.pack_floats(0, weight.float().contiguous().numpy())
        return torch.stack([torch.from_numpy(matrix.row(i)) for i in range(len(weight))])

    return replace(lora, factors={place: (rounded(A), rounded(B)) for place, (A, B) in lora.factors.items()})


CHOICES = [Choice("ar"), *(Choice(kind, n) for kind in ("linear", "quadratic", "lookup") for n in (2, 3, 5, 8))]


class AnyChoice:
    """What `auto` asks, choosing at random."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self.notes = []

    def choose(self, g, num_sharing, suggest):
        return self._random.choice(CHOICES)

    def note(self, g, num_drafted, num_accepted):
        assert 0 <= num_accepted <= num_drafted
        self.notes.append(num_accepted)

    def note_cost(self, drafting, num_inputs, context, seconds):
        assert context >= 0
        assert num_inputs > 0
        assert seconds > 0


@contextmanager
def looks_at_tensors() -> Iterator[list[str]]:
    """Every look at a tensor's numbers, by its kind: on a device each would wait for it."""
    looks: list[str] = []

    def counted(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: looks.append(name) or whole(self)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        yield looks
