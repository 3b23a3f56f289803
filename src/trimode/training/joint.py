"""The objectives over whole texts: joint (arXiv 2607.05722, section 2), diffusion alone, autoregression alone.

One forward reads [noisy | clean]: noisy tokens see their block and earlier clean blocks, clean ones see causally. The noisy half gives
the diffusion loss, the clean half the autoregressive one. Labels are of the same place for masks, of the next one for clean tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimode.diffusion.corruption import SampleNoise, mask_uniformly, plant_errors
from trimode.errors import DataError
from trimode.model.attention import KernelName, PackedAttention
from trimode.model.views import Causal, NoisyAndClean
from trimode.training.data import TokenBatch
from trimode.training.head import head_statistics
from trimode.training.objectives import Loss, Objective
from trimode.training.trainable import TrainableModel

__all__ = ["JointSettings", "autoregressive", "diffusion", "joint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSettings:
    """Weights of the two losses, and what noise there is beside masks."""

    diffusion_weight: float = 0.3
    """Of the diffusion loss beside the autoregressive one's 1."""
    planted_errors: float = 0.0
    """Share of a noisy half's known tokens that are replaced by wrong ones; the model must say the right ones there (revision)."""


@dataclass(frozen=True, slots=True)
class Noisy:
    """A batch with noise: what is read, and with which weight each place is asked for."""

    tokens: Int[Tensor, " N"]
    weight: Float[Tensor, " N"]
    """1 / p at masks, 1 at planted errors, else 0."""
    masked: Bool[Tensor, " N"]


def corrupt(model: TrainableModel, batch: TokenBatch, noise: SampleNoise, planted_errors: float) -> Noisy:
    """One mask ratio a text; what is given is never touched. All follows from the sample's own random numbers, so ratios vary over a
    batch and over ranks, however it was split."""
    mask = model.config.mask_token_id
    assert mask is not None
    tokens, weights, masks = [], [], []
    for start, length, given, sample in zip(batch.starts, batch.lengths, batch.num_prompts, batch.samples, strict=True):
        generator = noise.of(sample)
        text = batch.tokens[start : start + length].cpu()
        may_change = torch.arange(length) >= given
        masked, p = mask_uniformly(may_change, generator)
        weight = masked.float() / p
        noisy = torch.where(masked, mask, text)
        if planted_errors > 0:
            noisy, hit = plant_errors(
                noisy, may_change & ~masked, planted_errors, model.config.vocab_size, mask, generator
            )
            weight = weight + hit.float()
        tokens.append(noisy)
        weights.append(weight)
        masks.append(masked)
    device = model.device
    return Noisy(torch.cat(tokens).to(device), torch.cat(weights).to(device), torch.cat(masks).to(device))


def joint(settings: JointSettings, block_length: int) -> Objective:
    """L_AR + weight * L_diffusion, both divided by the number of all their tokens in the global batch."""
    return _over_both_halves(settings, block_length, autoregressive=True)


def diffusion(settings: JointSettings, block_length: int) -> Objective:
    """The diffusion loss alone, divided by the number of its tokens."""
    return _over_both_halves(settings, block_length, autoregressive=False)


def _over_both_halves(settings: JointSettings, block_length: int, *, autoregressive: bool) -> Objective:
    def objective(model: TrainableModel, batch: TokenBatch, noise: SampleNoise) -> Loss:
        noisy = corrupt(model, batch, noise, settings.planted_errors)
        halves = [
            half
            for own in _slices(batch)
            for half in (noisy.tokens[own], batch.tokens[own])  # each text's halves side by side
        ]
        each = [torch.arange(n, device=model.device) for n in batch.lengths]
        positions = torch.cat([half for own in each for half in (own, own)])
        views = [NoisyAndClean(n, block_length) for n in batch.lengths]
        attend = PackedAttention(views, [2 * n for n in batch.lengths], _kernel(model), model.device)
        hidden = _read(model, torch.cat(halves), positions, attend)
        noisy_row = torch.cat([2 * s + own for s, own in zip(batch.starts, each, strict=True)])
        asked = noisy.weight > 0
        losses = _cross_entropy(model, hidden[noisy_row[asked]], batch.tokens[asked]) * noisy.weight[asked]
        total, count = losses.sum(), float(len(losses))
        parts = {"diffusion": (float(total.detach()), count)}
        weight = settings.diffusion_weight if autoregressive else 1.0
        total = weight * total
        if autoregressive:
            clean_row = torch.cat([2 * s + len(own) + own for s, own in zip(batch.starts, each, strict=True)])
            source = _predicting(batch, model.device)
            ar = _cross_entropy(model, hidden[clean_row[source]], batch.tokens[source + 1]).sum()
            parts["ar"] = (float(ar.detach()), float(len(source)))
            total, count = total + ar, count + len(source)
        if count == 0:
            raise DataError("No token of this batch may be learnt: every document is all prompt.")
        return Loss(total, count, int(count), {"loss": (float(total.detach()), count), **parts})

    return objective


def autoregressive() -> Objective:
    """Cross-entropy of each next token that is not given."""

    def objective(model: TrainableModel, batch: TokenBatch, noise: SampleNoise) -> Loss:
        attend = PackedAttention([Causal()] * len(batch.lengths), batch.lengths, "sdpa", model.device)
        hidden = _read(model, batch.tokens, batch.positions, attend)
        source = _predicting(batch, model.device)
        if len(source) == 0:
            raise DataError("No token of this batch may be learnt: every document is all prompt.")
        total = _cross_entropy(model, hidden[source], batch.tokens[source + 1]).sum()
        count = float(len(source))
        return Loss(total, count, len(source), {"loss": (float(total.detach()), count)})

    return objective


def _read(model: TrainableModel, tokens: Tensor, positions: Tensor, attend: PackedAttention) -> Tensor:
    """A LoRA that is trained here is a part of the model and acts on every input."""
    return model(tokens, positions, attend, adapted=torch.arange(len(tokens), device=tokens.device))


def _slices(batch: TokenBatch) -> list[slice]:
    return [slice(start, start + length) for start, length in zip(batch.starts, batch.lengths, strict=True)]


def _predicting(batch: TokenBatch, device: torch.device) -> Tensor:
    """Places whose next token is to be learnt."""
    places = [
        torch.arange(start + max(given, 1) - 1, start + length - 1)
        for start, length, given in zip(batch.starts, batch.lengths, batch.num_prompts, strict=True)
    ]
    return torch.cat(places).to(device)


def _cross_entropy(model: TrainableModel, hidden: Tensor, target: Tensor) -> Tensor:
    # autocast reaches the forward of a hand-written gradient and not its backward: both operands are cast here
    name = hidden.device.type
    dtype = torch.get_autocast_dtype(name) if torch.is_autocast_enabled(name) else hidden.dtype
    lse, scores, _ = head_statistics(hidden.to(dtype), model.head_weight.to(dtype), target[:, None])
    return lse - scores[:, 0]


def _kernel(model: TrainableModel) -> KernelName:
    return "flex" if model.device.type == "cuda" else "sdpa"
