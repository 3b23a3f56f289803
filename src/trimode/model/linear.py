"""Linear maps, laid out for the CPU's matrix kernel where there is one, or held in int8 where memory is what counts.

The one idea worth knowing: in a packed product a row's result does not depend, bit for bit, on the rows beside it. That is what
makes an answer the same alone and in a batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PACKED_ROWS", "Linear", "as_map"]

PACKED_ROWS = 4
"""Fewest rows that a packed product is given."""


class Linear(nn.Module):
    """y = x W' + b, with W optionally packed for oneDNN.

    Packed weights are laid out once for the CPU's matrix kernel. Measured on two Zen 4 cores over all linear maps of the embedded model
    in float32: 25 ms for four rows and 27 ms for eight, against 53 ms unpacked for one. Fewer than four rows take longer than
    four (29 ms, 34 ms), so they are padded. From two rows on, a row's result is bit for bit the same whatever shares the product.
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False, **kwargs) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(num_outputs, num_inputs, **kwargs))
        self.bias = nn.Parameter(torch.empty(num_outputs, **kwargs)) if bias else None
        self._packed: Tensor | None = None
        self._int8: tuple[Tensor, Tensor] | None = None
        """Weight [outputs, inputs], and a scale for each output in the dtype of activations."""
        self._product: Any = F.linear

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return self._product(x, self.weight, self.bias)
        num_rows = x.shape[0]
        if num_rows >= PACKED_ROWS:
            return self._product(x, self._packed, self.bias, "none", [], "")
        x = F.pad(x, (0, 0, 0, PACKED_ROWS - num_rows))
        return self._product(x, self._packed, self.bias, "none", [], "")[:num_rows]

    # nobody hooks these leaves (sharding wraps whole layers), and nn.Module's own call costs half a millisecond a forward
    __call__ = forward

    @property
    def int8(self) -> tuple[Tensor, Tensor] | None:
        """Numbers [outputs, inputs] and a scale for each output, after `quantize`."""
        return self._int8

    @property
    def is_packed(self) -> bool:
        """Whether `pack` took effect."""
        return self._packed is not None

    def pack(self) -> None:
        """Lay the weight out for inference on the CPU and let go of the plain one. No-op where oneDNN has no kernel for it."""
        weight = self.weight
        if weight is not None and _can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
            self._product = torch.ops.mkldnn._linear_pointwise.default
            self.weight = None

    def quantize(self) -> None:
        """Hold the weight in int8 with a scale for each output, and let go of the plain one."""
        assert self.weight is not None
        weight = self.weight.detach()
        wide = weight.float()
        # an output without weights has no scale; any will do
        scales = wide.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        self._int8 = wide.div_(scales).round_().to(torch.int8), scales[:, 0].to(weight.dtype)
        self._product = self._int8_product
        self.weight = None

    def _int8_product(self, x: Tensor, weight: None, bias: Tensor | None) -> Tensor:
        """Written so that a compiler takes the widening into the product. Uncompiled it writes the widened weight to memory first: less
        memory is held, and no time is saved."""
        assert self._int8 is not None
        numbers, scales = self._int8
        y = F.linear(x, numbers.to(x.dtype)) * scales
        return y if bias is None else y + bias

    def dense_weight(self) -> Tensor:
        """The plain weight [outputs, inputs], packed or not; of int8 the numbers that it stands for."""
        if self.weight is not None:
            return self.weight.detach()
        if self._int8 is not None:
            numbers, scales = self._int8
            return numbers.to(scales.dtype) * scales[:, None]
        assert self._packed is not None
        return self._packed.to_dense()


def as_map(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x weight'. Packed unless a gradient is to reach the weight, so that no row depends on how many share the product."""
    if weight.requires_grad:
        return lambda x: F.linear(x, weight)
    linear = Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.pack()
    return linear


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
