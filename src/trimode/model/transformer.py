"""ONE transformer for every family and every decoder: the Llama block, on one screen.

It maps packed inputs (all rows of a forward behind one another, no padding) to hidden states. It knows no view, no cache and no
decoder: attention comes in as a function, the rows that the adapter acts on as an argument. The legend of shapes: N packed
inputs, H heads, G key-value heads, K head size, D width, V vocabulary.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimode.errors import CheckpointError
from trimode.model.attention import Attend
from trimode.model.config import ModelConfig
from trimode.model.linear import PACKED_ROWS, Linear
from trimode.model.lora import Lora
from trimode.model.rope import inverse_frequencies, query_scale, rotate, rotation

__all__ = ["Transformer"]


class RMSNorm(nn.Module):
    """x / rms(x) * w over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, **kwargs) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **kwargs))
        # a plain attribute: it is not part of a checkpoint
        self._eps = torch.tensor(eps, dtype=torch.float32)
        self._eps_number = eps

    def forward(self, x: Tensor) -> Tensor:
        # float32 whatever the dtype, rounded before the weight, as the families do. F.rms_norm takes twice the time on a CPU.
        if x.is_cuda:
            # one kernel instead of five, and no tensor of the CPU's that a captured graph could not hold
            return F.rms_norm(x, x.shape[-1:], eps=self._eps_number) * self.weight
        x32 = x.float()
        if self._eps.device != x.device:
            self._eps = self._eps.to(x.device)
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x32 * scale).to(x.dtype).mul_(self.weight)

    __call__ = forward


class Layer(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, index: int, config: ModelConfig, **kwargs) -> None:
        super().__init__()
        D, I, K = config.width, config.mlp_width, config.head_size  # noqa: E741
        H, G = config.num_heads, config.num_kv_heads
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_size = H, G, K
        self.attention_norm = RMSNorm(D, config.norm_eps, **kwargs)
        self.qkv = Linear(D, (H + 2 * G) * K, config.qkv_bias, **kwargs)
        self.q_norm = RMSNorm(K, config.norm_eps, **kwargs) if config.qk_norm else None
        self.k_norm = RMSNorm(K, config.norm_eps, **kwargs) if config.qk_norm else None
        self.output = Linear(H * K, D, config.output_bias, **kwargs)
        self.mlp_norm = RMSNorm(D, config.norm_eps, **kwargs)
        self.gate_up = Linear(D, 2 * I, config.mlp_bias, **kwargs)
        self.down = Linear(I, D, config.mlp_bias, **kwargs)
        self.widths = {"query": H * K, "key": G * K, "value": G * K, "output": D, "gate": I, "up": I, "down": D}

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: Tensor | None,
        attend: Attend,
        lora: Lora | None,
        rows: Tensor | None,
        acts: Tensor | None,
    ) -> Tensor:
        H, G = self.num_heads, self.num_kv_heads
        h = self.attention_norm(x)
        qkv = self._adapted(self.qkv, h, ("query", "key", "value"), lora, rows, acts).view(len(x), -1, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(qkv[:, :H]), self.k_norm(qkv[:, H : H + G])
            qk = rotate(torch.cat((q, k), dim=1), cos, sin)
        else:
            qk = rotate(qkv[:, : H + G], cos, sin)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, H + G :]
        if scale is not None:
            q = q * scale
        a = attend(self.index, q, k, v).flatten(1)
        x = x + self._adapted(self.output, a, ("output",), lora, rows, acts)
        h = self.mlp_norm(x)
        gate, up = self._adapted(self.gate_up, h, ("gate", "up"), lora, rows, acts).chunk(2, dim=-1)
        h = F.silu(gate).mul_(up)
        return x + self._adapted(self.down, h, ("down",), lora, rows, acts)

    def _adapted(
        self,
        linear: Linear,
        x: Tensor,
        parts: tuple[str, ...],
        lora: Lora | None,
        rows: Tensor | None,
        acts: Tensor | None,
    ) -> Tensor:
        """linear(x), the joint output of these parts, with the adapter added on its rows (None: on all; acts [N, 1] is one there)."""
        num_adapted = 0 if lora is None else sum((self.index, part) in lora.factors for part in parts)
        if lora is None or not num_adapted:
            return linear(x)
        if lora.is_trained and num_adapted == len(parts) and linear.weight is not None:
            return lora.product(self.index, parts, x, linear.weight, linear.bias, acts)
        y = linear(x)
        here, before = (x, y) if rows is None else (x[rows], y[rows])
        widths = [self.widths[part] for part in parts]
        added = lora.add(self.index, parts, here, before.split(widths, dim=-1), acts if rows is None else None)
        after = added[0] if len(added) == 1 else torch.cat(added, dim=-1)
        return after if rows is None else y.index_copy(0, rows, after)


class Transformer(nn.Module):
    """A decoder of the Llama family. Made empty; `load` fills it."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta"
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width, **kwargs)
        self.layers = nn.ModuleList(Layer(i, config, **kwargs) for i in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps, **kwargs)
        self.head = Linear(config.width, config.vocab_size, **kwargs)
        if config.tied_head:
            self.head.weight = self.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
        frequencies, self._rope_scale = inverse_frequencies(config.rope, config.head_size)
        # a plain attribute: .to(bfloat16) must never round it
        self._frequencies = frequencies
        self.recompute = False
        """Training keeps the inputs of each layer only, and computes the rest again for the gradient."""

    def forward(
        self,
        tokens: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        attend: Attend,
        *,
        lora: Lora | None = None,
        lora_rows: Int[Tensor, " n"] | None = None,
        lora_acts: Bool[Tensor, "N 1"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """Hidden states after the last norm. `lora` acts on the inputs that `lora_rows` names and on no others; or on those where
        `lora_acts` is true, however many: a captured graph cannot know how many rows it will be told."""
        num_rows = len(tokens)
        if self.head.is_packed and num_rows < PACKED_ROWS:
            # once here rather than in each linear map; attention never sees the padding
            tokens, positions = (F.pad(t, (0, PACKED_ROWS - num_rows)) for t in (tokens, positions))
            lora_acts = None if lora_acts is None else F.pad(lora_acts, (0, 0, 0, PACKED_ROWS - num_rows))
            attend = _WithoutPadding(attend, num_rows)
        x = self.embedding(tokens)
        if self._frequencies.device != x.device:
            self._frequencies = self._frequencies.to(x.device)
        cos, sin = rotation(positions, self._frequencies, self._rope_scale, x.dtype)
        scale = query_scale(self.config.rope, positions, x.dtype)
        acts: Tensor | None = None
        if lora is not None and lora_acts is not None:
            acts = lora_acts
            if lora.mask_embedding is not None:
                x = torch.where(acts, lora.mask_embedding.to(x.dtype), x)
        elif lora_rows is None or len(lora_rows) == 0:
            lora = lora_rows = None
        elif lora is not None and lora.mask_embedding is not None:
            x = x.index_copy(0, lora_rows, lora.mask_embedding.to(x.dtype).expand(len(lora_rows), -1))
        if lora_rows is not None and len(lora_rows) == len(x):
            lora_rows = None  # all of them: no gathering and scattering
        if lora is not None and lora.is_trained and lora_rows is not None:
            acts = x.new_zeros(len(x), 1).index_fill_(0, lora_rows, 1)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, scale, attend, lora, lora_rows, acts, use_reentrant=False)
                assert isinstance(x, Tensor)
            else:
                x = layer(x, cos, sin, scale, attend, lora, lora_rows, acts)
        return self.norm(x)[:num_rows]

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Scores of every token, in the model's dtype."""
        return self.head(hidden)

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, pack: bool = True, quantize: bool = False) -> None:
        """Take these tensors as the parameters, one at a time, packing each for the CPU as it comes: the peak is the model and
        one tensor. quantize: hold the layers' linear maps in int8, all but the head.

        Raises CheckpointError for a missing, unknown or misshapen one."""
        missing = dict(self.named_parameters(remove_duplicate=True))
        missing.pop("head.weight", None) if self.config.tied_head else None
        for name, tensor in tensors:
            expected = missing.pop(name, None)
            if expected is None:
                raise CheckpointError(f"The model has no parameter {name!r} left to fill.")
            if expected.shape != tensor.shape:
                raise CheckpointError(f"{name}: expected shape {tuple(expected.shape)}, found {tuple(tensor.shape)}.")
            owner, attribute = self._owner(name)
            setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
            if name == "embedding.weight" and self.config.tied_head:
                self.head.weight = self.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
                if pack:
                    self.head.pack()
            if isinstance(owner, Linear) and attribute == "weight":
                if quantize and owner is not self.head:
                    owner.quantize()
                elif pack:
                    owner.pack()
        self._frequencies = self._frequencies.to(self.embedding.weight.device)
        if missing:
            raise CheckpointError(f"The checkpoint lacks {', '.join(sorted(missing)[:5])} ({len(missing)} in all).")

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.get_submodule(path), attribute

    def dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, unpacked, one at a time: what `load` takes."""
        yield "embedding.weight", self.embedding.weight.detach()
        for path, module in self.named_modules():
            if isinstance(module, Linear) and not (path == "head" and self.config.tied_head):
                yield f"{path}.weight", module.dense_weight()
                if module.bias is not None:
                    yield f"{path}.bias", module.bias.detach()
            elif isinstance(module, RMSNorm):
                yield f"{path}.weight", module.weight.detach()


class _WithoutPadding:
    """An attention function that sees only the first rows; the others get zeros."""

    def __init__(self, attend: Attend, num_rows: int) -> None:
        self._attend = attend
        self._num_rows = num_rows
        self._padded: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._padded is None:
            self._padded = torch.zeros_like(q)
        n = self._num_rows
        self._padded[:n] = self._attend(layer, q[:n], k[:n], v[:n])
        return self._padded
