"""What is minimised: each objective maps (model, batch, noise) to a sum of losses and the count to divide it by.

Sums and counts add up over micro-batches and ranks, so the average is over the global batch however it was split. An objective draws
all it needs from the noise of each sample, in a fixed order, and knows no optimiser and no step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimode.diffusion.corruption import SampleNoise
from trimode.errors import DataError
from trimode.model.attention import BlocksOverText, NoisyBlocks, PackedAttention, Recorded
from trimode.model.views import Causal
from trimode.training.data import TokenBatch
from trimode.training.head import CHUNK_ROWS, head_statistics
from trimode.training.trainable import TrainableModel

__all__ = ["ConversionSettings", "Loss", "Objective", "convert_adapter", "drafts_that_match", "matched_drafts"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum over a batch. The loss of a global batch is the sum of totals over the sum of counts."""

    total: Tensor
    count: float
    positions: int
    """Places that were asked for: what the speed of a run is counted in."""
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """For the log: sums and counts by name."""


Objective = Callable[[TrainableModel, TokenBatch, SampleNoise], Loss]


# ---- conversion by a gated adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionSettings:
    """How blocks are drawn for the conversion, and what is asked of them."""

    block_lengths: tuple[int, ...] = (8,)
    """A sample's block length is drawn from those that the curriculum has reached."""
    grown_at: float = 0.0
    """Share of the run after which all block lengths are reached; the smallest is from the start."""
    blocks_per_document: int = 32
    partial: float = 0.25
    """Share of samples whose blocks hold known tokens between the masks."""
    decay: float = 4.0
    """Weight exp(-distance / decay), the distance counted from the last known token."""
    reach: float = 0.0
    """Share of that weight which a place earns by the chance that its block's draft gets there: the product of what the adapter gives
    the right tokens before it. What lies behind a draft's likely end then counts for less."""
    plain: float = 0.25
    """Share of the blocks whose places are also asked without the token before, where the adapter has a successor for those that know
    it: what `diffusion` fills its blocks by."""
    distill: float = 0.5
    """Weight of the distance to the base's own distribution beside the cross-entropy's 1 - distill."""
    top: int = 32
    """Tokens of the base's distribution that are told apart; the rest is one."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The inputs of noisy blocks, and what they should say."""

    tokens: Tensor
    positions: Tensor
    adapted: Tensor
    """Indices of the inputs that are masks."""
    texts: list[NoisyBlocks]
    source: Tensor
    """For each row the clean row that predicts the same place."""
    target: Tensor
    """The token there."""
    weight: Tensor
    """Zero where nothing is asked."""
    distance: Tensor
    """Masks since the last known token."""
    block: Tensor
    """Number of the first row of its block."""
    plain: Tensor
    """Whether it may not know the token before its place."""


def convert_adapter(settings: ConversionSettings) -> Objective:
    """The frozen base reads the clean text; masks behind each of many anchors, on which alone the adapter acts, see it up to there
    and one another, and predict the *next* place (so that the row of the anchor, the base's own, gives a block's first token).

    Cross-entropy with the text plus the distance to the base's distribution there (KL and total variation, arXiv 2609.04010).
    """

    def objective(model: TrainableModel, batch: TokenBatch, noise: SampleNoise) -> Loss:
        rows = _draw_rows(model, batch, noise, settings)
        clean = Recorded(PackedAttention([Causal()] * len(batch.lengths), batch.lengths, "sdpa", model.device))
        with torch.no_grad():
            hidden = model(batch.tokens, batch.positions, clean)
        asked = rows.weight > 0
        noisy = model(rows.tokens, rows.positions, BlocksOverText(clean, rows.texts), adapted=rows.adapted)
        student = noisy[asked]
        successor = model.successor
        if successor is not None:
            before = model.embed(batch.tokens[rows.source[asked]])
            student = torch.where(rows.plain[asked][:, None], student, successor.changed(student, before))
        target, weight = rows.target[asked], rows.weight[asked]
        with torch.no_grad():
            places, index = rows.source[asked].unique(return_inverse=True)
            likely, probability = _top(model.logits(hidden[places]), settings.top)
            likely, probability = likely[index], probability[index]
        wanted = torch.cat((target[:, None], likely), dim=1)
        lse, scores, best = head_statistics(student, model.head_weight, wanted)
        logprobs = scores - lse[:, None]
        if settings.reach > 0:
            reached = _reached(logprobs[:, 0].detach(), rows, asked)
            weight = weight * (1 - settings.reach + settings.reach * reached)
        losses = cross_entropy_and_distance(logprobs, probability, settings.distill)
        total = (losses * weight).sum()
        parts = {"loss": (float(total.detach()), float(weight.sum()))}
        right = best == likely[:, 0]
        for d in range(1, 5):
            here = rows.distance[asked] == d
            parts[f"agree_{d}"] = (float(right[here].sum()), float(here.sum()))
        return Loss(total, float(weight.sum()), len(target), parts)

    return objective


@torch.no_grad()
def matched_drafts(
    model: TrainableModel, batch: TokenBatch, *, block_length: int, blocks_per_document: int = 16
) -> dict[str, float]:
    """How well full blocks of masks draft on given texts: `matched`, the mean number of drafts before the first that differs from the
    base's own choice (its exact token behind the anchor not counted), and `agree_d` by distance.

    Teacher-forced: the texts should be the base's own greedy answers.
    """
    right, asked = drafts_that_match(model, batch, block_length=block_length, blocks_per_document=blocks_per_document)
    measures = {"matched": float(right.cumprod(dim=1).sum(dim=1).float().mean())}
    for d in range(min(4, right.shape[1])):
        measures[f"agree_{d + 1}"] = float(right[:, d].sum() / asked[:, d].sum().clamp(min=1))
    return measures


@torch.no_grad()
def drafts_that_match(
    model: TrainableModel, batch: TokenBatch, *, block_length: int, blocks_per_document: int
) -> tuple[Bool[Tensor, "n d"], Bool[Tensor, "n d"]]:
    """For n blocks, in the order of their anchors, which drafts behind the exact first token are the base's own choice, and which lie
    within the text. With as many blocks as an answer has tokens, every token is an anchor."""
    settings = ConversionSettings(
        block_lengths=(block_length,), blocks_per_document=blocks_per_document, partial=0.0, decay=1e9
    )
    rows = _draw_rows(model, batch, SampleNoise(0), settings)
    clean = Recorded(PackedAttention([Causal()] * len(batch.lengths), batch.lengths, "sdpa", model.device))
    hidden = model(batch.tokens, batch.positions, clean)
    noisy = model(rows.tokens, rows.positions, BlocksOverText(clean, rows.texts), adapted=rows.adapted)
    places, index = rows.source.unique(return_inverse=True)
    expected = model.logits(hidden[places]).argmax(-1)[index]
    m = block_length - 1
    # beyond the text there is nothing to match: such rows count as wrong
    inside = (rows.weight > 0).view(-1, m)
    logits = model.logits(noisy)
    logits[:, model.config.mask_token_id] = float("-inf")
    if model.successor is None:
        drafts = logits.argmax(-1).view(-1, m)
    else:
        exact = batch.tokens[rows.source.view(-1, m)[:, 0]]
        hidden, logits = noisy.view(-1, m, noisy.shape[-1]), logits.view(-1, m, logits.shape[-1])
        drafts = model.successor.draft(hidden, logits, exact, model.embed, lambda ids: model.head_weight[ids])
    return (drafts == expected.view(-1, m)) & inside, inside


def cross_entropy_and_distance(
    logprobs: Float[Tensor, "n k+1"], probability: Float[Tensor, "n k"], distill: float
) -> Float[Tensor, " n"]:
    """(1 - distill) * cross-entropy + distill * (KL + TV) from the teacher, a row each.

    logprobs: the student's, of the target and then of the teacher's likeliest tokens, whose probabilities at the teacher are given.
    All other tokens count as one.
    """
    entropy, q = -logprobs[:, 0], logprobs[:, 1:]
    if distill == 0:
        return entropy
    # in float32 the sum over all likely tokens may round to one or above
    rest_p = (1 - probability.sum(-1)).clamp(min=1e-6)
    rest_q = (1 - q.exp().sum(-1)).clamp(min=1e-6)
    kl = (probability * (probability.clamp(min=1e-9).log() - q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    tv = 0.5 * ((probability - q.exp()).abs().sum(-1) + (rest_p - rest_q).abs())
    return (1 - distill) * entropy + distill * (kl + tv)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [n, k] and their probabilities."""
    scores, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
    lse = torch.cat([rows.float().logsumexp(dim=-1, keepdim=True) for rows in logits.split(CHUNK_ROWS)])
    return tokens, (scores.float() - lse).exp()


def _draw_rows(model: TrainableModel, batch: TokenBatch, noise: SampleNoise, settings: ConversionSettings) -> _Rows:
    mask = model.config.mask_token_id
    assert mask is not None
    device = model.device
    each: dict[str, list[Tensor]] = {
        name: [] for name in ("tokens", "positions", "source", "target", "weight", "distance", "block", "plain")
    }
    texts = []
    num_rows = 0
    for start, length, given, sample in zip(batch.starts, batch.lengths, batch.num_prompts, batch.samples, strict=True):
        generator = noise.of(sample)
        ids = batch.tokens[start : start + length].cpu()
        m = _block_length(settings, batch.progress, generator) - 1
        # an anchor needs a token after the one that the base itself predicts
        candidates = torch.arange(max(given - 1, 0), length - 2)
        order = torch.randperm(len(candidates), generator=generator)[: settings.blocks_per_document]
        anchors = candidates[order].sort().values
        n = len(anchors)
        if n == 0:
            continue
        places = anchors[:, None] + torch.arange(1, m + 1)
        text = ids[places.clamp(max=length - 1)]
        known = torch.zeros(n, m, dtype=torch.bool)
        if m > 1 and float(torch.rand((), generator=generator)) < settings.partial:
            ratio = torch.rand(n, 1, generator=generator)
            known = torch.rand(n, m, generator=generator) < ratio
            # directly behind the anchor a known token would be part of the text
            known[:, 0] = False
            known &= places < length
        tokens = torch.where(known, text, mask)
        is_next_masked = torch.cat((~known[:, 1:], torch.ones(n, 1, dtype=torch.bool)), dim=1)
        asked = is_next_masked & (places + 1 < length)
        distance = _since_known(known)
        weight = torch.exp(-(distance - 1).float() / settings.decay) * asked
        texts.append(NoisyBlocks(start, anchors.to(device), m))
        each["tokens"].append(tokens.flatten())
        each["positions"].append(places.flatten())
        each["source"].append((start + places).clamp(max=start + length - 1).flatten())
        each["target"].append(ids[(places + 1).clamp(max=length - 1)].flatten())
        each["weight"].append(weight.flatten())
        each["distance"].append(distance.flatten())
        # drawn last, so that the rest is the same with and without a successor
        plain = torch.rand(n, generator=generator) < settings.plain
        each["plain"].append(plain.repeat_interleave(m))
        each["block"].append((num_rows + m * torch.arange(n)).repeat_interleave(m))
        num_rows += n * m
    if not texts:
        raise DataError("No document of this batch is long enough for a block: an answer needs at least three tokens.")
    joined = {name: torch.cat(parts).to(device) for name, parts in each.items()}
    adapted = (joined["tokens"] == mask).nonzero()[:, 0]
    return _Rows(adapted=adapted, texts=texts, **joined)


def _reached(logprob: Tensor, rows: _Rows, asked: Tensor) -> Tensor:
    """Of each place that is asked: the product of the probabilities of those before it in its block, since the last known token.

    logprob: the student's, of the right token at each place asked.
    """
    each = torch.zeros(len(asked), dtype=torch.float64, device=logprob.device).masked_scatter(asked, logprob.double())
    # sums over the rows before a row, less what they were at its block's beginning or last known token
    before = each.cumsum(0) - each
    first = torch.maximum(rows.block, torch.arange(len(asked), device=logprob.device) - rows.distance + 1)
    return (before - before[first])[asked].exp().float()


def _block_length(settings: ConversionSettings, progress: float, generator: torch.Generator) -> int:
    lengths = sorted(set(settings.block_lengths))
    reached = 1.0 if settings.grown_at <= 0 else min(progress / settings.grown_at, 1.0)
    allowed = [n for n in settings.block_lengths if n <= lengths[round(reached * (len(lengths) - 1))]]
    return allowed[int(torch.randint(len(allowed), (), generator=generator))]


def _since_known(known: Tensor) -> Tensor:
    """For each place of each block, how many places it lies behind the last known one (the anchor is known)."""
    places = torch.arange(1, known.shape[1] + 1).expand_as(known)
    last = torch.where(known, places, 0).cummax(dim=1).values
    return (places - last).clamp(min=1)
