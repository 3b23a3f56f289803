"""Which base an adapter was trained on: enough to refuse another model, whatever file format or dtype the same one comes in.

Sizes and norms must be equal: every format keeps norms unquantised, and no two trainings end with the same ones. Some weights of the
attention are compared loosely, since quantising moves them a little; they tell apart models whose norms were never trained.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from trimode.checkpoint.stored import StoredTensor
from trimode.model.config import ModelConfig

__all__ = ["base_fingerprint", "same_base"]

NUM_PROBES = 16
LEAST_COSINE = 0.98
"""Of the probed weights. Q4_0 blocks of random numbers keep 0.996; another model's are near 0."""


def base_fingerprint(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The fingerprint of opened weights, ready for JSON. Reads the norms and one row of some layers."""
    import torch

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(stored[name].shape, dtype=torch.float32)
        stored[name].read_into(tensor)
        return tensor

    digest = hashlib.sha256()
    for name in ["norm.weight", *(f"layers.{i}.input_layernorm.weight" for i in range(config.num_layers))]:
        digest.update(read(name).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    probes: list[float] = []
    for i in sorted({0, config.num_layers // 2, config.num_layers - 1}):
        row = read(f"layers.{i}.self_attn.k_proj.weight")[0, :NUM_PROBES]
        probes += [float(f"{value:.4g}") for value in row.tolist()]
    sizes = (
        config.vocab_size,
        config.width,
        config.mlp_width,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
    )
    return {"sizes": list(sizes), "norms": digest.hexdigest()[:32], "weights": probes}


def same_base(expected: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of one model."""
    if any(expected.get(key) != found[key] for key in ("sizes", "norms")):
        return False
    a, b = expected.get("weights"), found["weights"]
    if not isinstance(a, list) or len(a) != len(b):
        return False
    norms = math.hypot(*a) * math.hypot(*b)
    return norms > 0 and sum(x * y for x, y in zip(a, b, strict=True)) >= LEAST_COSINE * norms
