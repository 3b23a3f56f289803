"""What is trained: a transformer, an adapter over it, or both, as one module with one way to call it."""

import math
import re
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trimode.errors import SettingError
from trimode.model.attention import Attend
from trimode.model.lora import ADAPTED_PARTS, Lora
from trimode.model.successor import Successor
from trimode.model.transformer import Transformer

__all__ = ["AdapterParameters", "TrainableModel", "merged_tensors"]

_WEIGHT = re.compile(r"layers\.(\d+)\.(\w+)\.weight")
_PARTS = {
    "qkv": ("query", "key", "value"),
    "output": ("output",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "attention_norm": (),
    "mlp_norm": (),
    "q_norm": (),
    "k_norm": (),
}
"""Parts of each weight of a layer, in the order of its rows."""


class AdapterParameters(nn.Module):
    """The factors of a LoRA as float32 parameters, B at zero (so that it starts as no change), the mask's own embedding, and perhaps
    what lets drafts know the draft before them (`successor`: its inner width)."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        rank: int,
        alpha: float,
        parts: Sequence[str] = ADAPTED_PARTS,
        mask_embedding: bool = True,
        successor: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        unknown = [part for part in parts if part not in ADAPTED_PARTS]
        if unknown or not parts:
            raise SettingError(
                f"An adapter's parts are some of {', '.join(ADAPTED_PARTS)}; got {', '.join(parts) or 'none'}."
            )
        config = transformer.config
        generator = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.scale = alpha / rank
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        sizes = config.part_sizes
        for layer in range(config.num_layers):
            for part in parts:
                inputs, outputs = sizes[part]
                bound = 1 / math.sqrt(inputs)
                A = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
                self.A[f"{layer}_{part}"] = nn.Parameter(A)
                self.B[f"{layer}_{part}"] = nn.Parameter(torch.zeros(outputs, rank))
        self.mask_embedding: nn.Parameter | None = None
        if mask_embedding:
            # an average token: the mask token's own row was never trained
            self.mask_embedding = nn.Parameter(transformer.embedding.weight.detach().float().mean(dim=0))
        self.successor: nn.ParameterDict | None = None
        if successor:
            inner = torch.empty(successor, 2 * config.width)
            inner.uniform_(-1, 1, generator=generator).div_(math.sqrt(2 * config.width))
            outer = torch.zeros(config.width, successor)
            self.successor = nn.ParameterDict({"inner": nn.Parameter(inner), "outer": nn.Parameter(outer)})

    def lora(self, dtype: torch.dtype | None = None) -> Lora:
        """The adapter as the transformer takes it; with a dtype, cast so that products run in it (gradients flow through)."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor if dtype is None else tensor.to(dtype)

        factors = {}
        for name in self.A:
            layer, part = name.split("_")
            factors[int(layer), part] = (cast(self.A[name]), cast(self.B[name]))
        successor = None
        if self.successor is not None:
            successor = Successor(cast(self.successor["inner"]), cast(self.successor["outer"]))
        return Lora(factors, self.scale, self.mask_embedding, successor)

    def take(self, lora: Lora) -> None:
        """Take these factors as the parameters' values."""
        with torch.no_grad():
            for (layer, part), (A, B) in lora.factors.items():
                self.A[f"{layer}_{part}"].copy_(A)
                self.B[f"{layer}_{part}"].copy_(B)
            if self.mask_embedding is not None and lora.mask_embedding is not None:
                self.mask_embedding.copy_(lora.mask_embedding)
            if self.successor is not None and lora.successor is not None:
                self.successor["inner"].copy_(lora.successor.inner)
                self.successor["outer"].copy_(lora.successor.outer)


def merged_tensors(model: "TrainableModel") -> Iterator[tuple[str, Tensor]]:
    """The trained transformer's parameters by name, whole, with the adapter multiplied into the weights it acts on."""
    lora = None if model.adapter is None else model.adapter.lora()
    for name, tensor in model.transformer.dense_tensors():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        match = _WEIGHT.fullmatch(name)
        if lora is not None and match is not None:
            layer, row = int(match[1]), 0
            whole = whole.float().clone()
            for part in _PARTS[match[2]]:
                num = model.config.part_sizes[part][1]
                if (layer, part) in lora.factors:
                    A, B = lora.factors[layer, part]
                    whole[row : row + num] += lora.scale * (B.detach() @ A.detach())
                row += num
        yield name, whole


class TrainableModel(nn.Module):
    """A transformer (frozen where an adapter is trained) and perhaps an adapter."""

    def __init__(self, transformer: Transformer, adapter: AdapterParameters | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.adapter = adapter
        transformer.requires_grad_(adapter is None)

    @property
    def config(self):
        """The transformer's."""
        return self.transformer.config

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.transformer.embedding.weight.device

    def forward(
        self,
        tokens: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        attend: Attend,
        adapted: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """Hidden states; the adapter acts on the inputs that `adapted` names."""
        lora = None
        if adapted is not None and self.adapter is not None:
            lora = self.adapter.lora(self.transformer.embedding.weight.dtype)
        return self.transformer(tokens, positions, attend, lora=lora, lora_rows=adapted)

    @property
    def successor(self) -> Successor | None:
        """What changes the hidden states of masks by the token before, in the transformer's dtype."""
        dtype = self.transformer.embedding.weight.dtype
        return None if self.adapter is None else self.adapter.lora(dtype).successor

    def embed(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Rows of the embedding."""
        return self.transformer.embedding(tokens)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] What hidden states are multiplied with to give logits."""
        weight = self.transformer.head.weight
        assert weight is not None  # training loads unpacked
        return weight

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Scores of every token."""
        return self.transformer.logits(hidden)
