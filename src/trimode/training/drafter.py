"""A LoRA for the drafts of a checkpoint that decodes in every mode already (arXiv 2607.05722, section 3.3).

The adapter acts on a draft's inputs and nowhere else, so the text stays the causal view's; it only learns to draft what that view will
accept. The causal view is the teacher and is never trained.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimode.diffusion.corruption import SampleNoise
from trimode.errors import DataError
from trimode.model.attention import BlocksOverText, NoisyBlocks, PackedAttention, Recorded
from trimode.model.views import Causal
from trimode.training.data import TokenBatch
from trimode.training.objectives import Loss, Objective
from trimode.training.trainable import TrainableModel

__all__ = ["DrafterSettings", "Round", "accepted_drafts", "draft_and_verify", "draft_loss", "train_drafter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSettings:
    """The paper's figures."""

    blocks_per_document: int = 32
    sampled: float = 0.9
    """Share of blocks drafted by sampling; the others by arg-max."""
    temperature: float = 3.0
    """Of the two distributions that are compared."""
    top: int = 200
    """Likeliest tokens of either that are compared."""
    sharpness: float = 0.5
    """KL has the weight exp(-sharpness * acceptance), total variation the rest."""


@dataclass(frozen=True, slots=True)
class Round:
    """Drafts of n blocks and what the causal view says of them."""

    drafted: Float[Tensor, "n d V"]
    """Logits of the drafts, with their gradient."""
    verified: Float[Tensor, "n d V"]
    """Logits of the causal view for the same places, each behind the drafts before it."""
    drafts: Int[Tensor, "n d"]
    sampled: Tensor
    """[n] Which blocks were drafted by sampling."""
    chance: Float[Tensor, "n d"]
    """Uniform numbers that decide on sampled drafts."""


def draft_and_verify(
    model: TrainableModel,
    batch: TokenBatch,
    noise: SampleNoise,
    *,
    block_length: int,
    blocks_per_document: int,
    sampled: float,
) -> Round:
    """A linear self-speculation round at each of many places of each text: a block's first token is the text's, the rest masks."""
    mask = model.config.mask_token_id
    assert mask is not None
    device, d = model.device, block_length - 1
    clean = Recorded(PackedAttention([Causal()] * len(batch.lengths), batch.lengths, "sdpa", device))
    with torch.no_grad():
        model(batch.tokens, batch.positions, clean)
    texts, firsts, positions, by_sampling, uniform, chance = [], [], [], [], [], []
    for start, length, given, sample in zip(batch.starts, batch.lengths, batch.num_prompts, batch.samples, strict=True):
        generator = noise.of(sample)
        candidates = torch.arange(max(given, 1), length)
        chosen = torch.randperm(len(candidates), generator=generator)[:blocks_per_document]
        places = candidates[chosen].sort().values
        if len(places) == 0:
            continue
        texts.append(NoisyBlocks(start, (places - 1).to(device), block_length))
        firsts.append(batch.tokens[start + places.to(device)])
        positions.append((places[:, None] + torch.arange(block_length)).flatten())
        by_sampling.append(torch.rand(len(places), generator=generator) < sampled)
        uniform.append(torch.rand(len(places), d, generator=generator, dtype=torch.float64))
        chance.append(torch.rand(len(places), d, generator=generator))
    if not texts:
        raise DataError("No document of this batch has a place to draft at: an answer needs a token.")
    first, where = torch.cat(firsts), torch.cat(positions).to(device)
    n = len(first)
    masks = torch.full((n, d), mask, device=device)
    inputs = torch.cat((first[:, None], masks), dim=1).flatten()
    hidden = model(inputs, where, BlocksOverText(clean, texts), adapted=torch.arange(len(inputs), device=device))
    drafted = model.logits(hidden.view(n, block_length, -1)[:, 1:].flatten(0, 1)).view(n, d, -1)
    with torch.no_grad():
        scores = _without(drafted.detach().float(), mask)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        target = torch.cat(uniform).to(device)[..., None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, target).squeeze(-1).clamp(max=scores.shape[-1] - 1)
        use = torch.cat(by_sampling).to(device)
        drafts = torch.where(use[:, None], drawn, scores.argmax(-1))
        inputs = torch.cat((first[:, None], drafts), dim=1).flatten()
        hidden = model(inputs, where, BlocksOverText(clean, texts, causal=True))
        verified = model.logits(hidden.view(n, block_length, -1)[:, :-1].flatten(0, 1)).view(n, d, -1)
    return Round(
        _without(drafted.float(), mask), _without(verified.float(), mask), drafts, use, torch.cat(chance).to(device)
    )


def train_drafter(settings: DrafterSettings, block_length: int) -> Objective:
    """On the accepted drafts of each block and the first rejected one: cross-entropy to the verifier's choice and LK hybrid."""

    def objective(model: TrainableModel, batch: TokenBatch, noise: SampleNoise) -> Loss:
        found = draft_and_verify(
            model,
            batch,
            noise,
            block_length=block_length,
            blocks_per_document=settings.blocks_per_document,
            sampled=settings.sampled,
        )
        accepted = _accepted(found)
        before = accepted.cumprod(dim=1)
        # a place counts if all drafts before it were accepted: the accepted ones and the first that was not
        reached = torch.cat((torch.ones_like(before[:, :1]), before[:, :-1]), dim=1).bool()
        losses = draft_loss(found.drafted[reached], found.verified[reached], settings)
        total, count = losses.sum(), float(len(losses))
        matched = before.sum(dim=1).float()
        parts = {
            "loss": (float(total.detach()), count),
            "accepted": (float(matched.sum()), float(len(matched))),
        }
        return Loss(total, count, len(losses), parts)

    return objective


def draft_loss(
    drafted: Float[Tensor, "n V"], verified: Float[Tensor, "n V"], settings: DrafterSettings
) -> Float[Tensor, " n"]:
    """Of each place: cross-entropy to the arg-max, plus w * KL(p || q) + (1 - w) * TV(p, q) over the likeliest tokens of both
    at the raised temperature, with w = exp(-sharpness * the chance that a draft from q is accepted)."""
    entropy = torch.nn.functional.cross_entropy(drafted, verified.argmax(-1), reduction="none")
    k = min(settings.top, drafted.shape[-1])
    theirs, ours = verified.topk(k, dim=-1).indices, drafted.detach().topk(k, dim=-1).indices
    again = (ours[:, :, None] == theirs[:, None, :]).any(-1)
    tokens = torch.cat((theirs, ours), dim=1)
    twice = torch.cat((torch.zeros_like(again), again), dim=1)
    p, q = (
        (logits.gather(-1, tokens) / settings.temperature).masked_fill(twice, float("-inf")).log_softmax(-1)
        for logits in (verified, drafted)
    )
    p, q = p.masked_fill(twice, 0.0), q.masked_fill(twice, 0.0)  # 0 * inf would be no number
    there = (~twice).float()
    kl = (there * p.exp() * (p - q)).sum(-1)
    tv = 0.5 * (there * (p.exp() - q.exp()).abs()).sum(-1)
    acceptance = torch.minimum(drafted.detach().softmax(-1), verified.softmax(-1)).sum(-1)
    w = torch.exp(-settings.sharpness * acceptance)
    return entropy + w * kl + (1 - w) * tv


@torch.no_grad()
def accepted_drafts(
    model: TrainableModel, batch: TokenBatch, *, block_length: int, blocks_per_document: int = 16
) -> dict[str, float]:
    """How many greedy drafts of a block the causal view accepts, on average."""
    found = draft_and_verify(
        model, batch, SampleNoise(0), block_length=block_length, blocks_per_document=blocks_per_document, sampled=0.0
    )
    right = found.drafts == found.verified.argmax(-1)
    return {"matched": float(right.cumprod(dim=1).sum(dim=1).float().mean())}


def _accepted(found: Round) -> Tensor:
    """[n, d] Whether each draft would be accepted by itself: by rejection sampling where it was sampled, else if it is the arg-max."""
    p, q = found.verified.softmax(-1), found.drafted.detach().softmax(-1)
    index = found.drafts[..., None]
    by_chance = found.chance * q.gather(-1, index)[..., 0] < p.gather(-1, index)[..., 0]
    return torch.where(found.sampled[:, None], by_chance, found.drafts == found.verified.argmax(-1)).long()


def _without(logits: Tensor, token: int) -> Tensor:
    """The mask is never drafted and never text."""
    ban = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    ban[token] = True
    return logits.masked_fill(ban, -1e9)
