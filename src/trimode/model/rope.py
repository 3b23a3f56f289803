"""Rotary position embedding: its frequencies in every variant that the supported families use, and its application.

Frequencies are computed and kept in float32 whatever the model's dtype: rounding them to bfloat16 turns a phase at position
2,000 by up to two radians.
"""

import math

import torch
from torch import Tensor

from trimode.model.config import RopeConfig

__all__ = ["inverse_frequencies", "query_scale", "rotate", "rotation"]


def inverse_frequencies(rope: RopeConfig, head_size: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [K/2], and the factor on cos and sin."""
    d = head_size
    # double, then one rounding: the published constants are those of exact arithmetic
    powers = torch.arange(0, d, 2, dtype=torch.float64) / d
    plain = rope.theta**-powers
    if rope.kind == "default":
        return plain.float(), 1.0
    if rope.kind == "linear":
        return (plain / rope.factor).float(), 1.0
    assert rope.original_max_positions is not None
    original = rope.original_max_positions
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / plain
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (plain * smooth + plain / rope.factor * (1 - smooth)).float(), 1.0

    # YaRN, arXiv 2309.00071
    def dimension(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(d // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    stretched = plain / rope.factor * ramp + plain * (1 - ramp)
    return stretched.float(), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    def mscale(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rotation(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, and sin with the sign that each half needs, [N, 1, K], computed in float32 and then rounded to `dtype`."""
    phase = positions.float()[:, None, None] * frequencies
    cos, sin = (phase.cos() * scale).to(dtype), (phase.sin() * scale).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x: [N, heads, K] turned by their positions; the two halves of a head are the two coordinates."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


def query_scale(rope: RopeConfig, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Llama 4's growth of queries with their position, [N, 1, 1]; None where it is off or still exactly 1."""
    if rope.llama4_beta is None or rope.original_max_positions is None:
        return None
    periods = torch.floor(positions.float() / rope.original_max_positions)
    return (1 + rope.llama4_beta * torch.log1p(periods)).to(dtype)[:, None, None]
