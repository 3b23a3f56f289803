"""The conversion objective, its attention and its head, against the same things written out."""

import pytest
import torch

from tests.worlds import random_transformer, tiny_config
from trimode.diffusion.corruption import SampleNoise
from trimode.engine.language_model import LanguageModel
from trimode.model.attention import PackedAttention
from trimode.model.views import BlockOverCausal
from trimode.training.data import Document, Mixture, pack
from trimode.training.head import head_statistics
from trimode.training.objectives import (
    ConversionSettings,
    convert_adapter,
    cross_entropy_and_distance,
    drafts_that_match,
)
from trimode.training.optim import learning_rate
from trimode.training.trainable import AdapterParameters, TrainableModel


def test_head_statistics_and_their_gradients_equal_the_whole_logits():
    hidden = torch.randn(70, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.double, requires_grad=True)
    wanted = torch.randint(0, 11, (70, 3))
    lse, scores, best = head_statistics(hidden, weight, wanted)
    logits = hidden @ weight.T
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.double(), logits.gather(-1, wanted), atol=1e-5, rtol=0)
    assert best.tolist() == logits.argmax(-1).tolist()
    a, b = torch.randn(70), torch.randn(70, 3)
    ours = torch.autograd.grad((lse * a).sum() + (scores * b).sum(), (hidden, weight))
    plain = torch.autograd.grad(
        (logits.logsumexp(-1) * a).sum() + (logits.gather(-1, wanted) * b).sum(), (hidden, weight)
    )
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_distance_over_the_whole_vocabulary_is_kl_and_total_variation():
    p, q = torch.randn(5, 6).softmax(-1), torch.randn(5, 6).log_softmax(-1)
    target = torch.tensor([0, 1, 2, 3, 4])
    logprobs = torch.cat((q.gather(-1, target[:, None]), q), dim=1)
    got = cross_entropy_and_distance(logprobs, p, distill=0.25)
    kl = (p * (p.log() - q)).sum(-1)
    tv = 0.5 * (p - q.exp()).abs().sum(-1)
    torch.testing.assert_close(got, -0.75 * logprobs[:, 0] + 0.25 * (kl + tv), atol=1e-4, rtol=1e-4)


def test_noise_hangs_on_seed_and_sample_alone():
    noise = SampleNoise(3)
    first = torch.rand(4, generator=noise.of(5))
    assert torch.equal(first, torch.rand(4, generator=SampleNoise(3).of(5)))
    assert not torch.equal(first, torch.rand(4, generator=noise.of(6)))
    assert not torch.equal(first, torch.rand(4, generator=SampleNoise(4).of(5)))


def test_a_pass_of_a_mixture_holds_every_document_once_and_can_be_entered_anywhere():
    documents = [Document((i, i, i, i), 1) for i in range(7)]
    data = Mixture([(documents, 1.0)], seed=2)
    for number in range(3):
        assert sorted(data[number * 7 + i].ids[0] for i in range(7)) == list(range(7))
    assert [data[i].ids for i in range(5, 12)] == [Mixture([(documents, 1.0)], seed=2)[i].ids for i in range(5, 12)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_learning_rate_warms_up_and_ends_where_it_should(schedule):
    rates = [learning_rate(i, peak=1.0, steps=100, warmup=10, schedule=schedule, decay=0.5) for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_places_of_a_successor_are_scored_behind_the_token_before_and_plain_ones_are_not():
    transformer = random_transformer(tiny_config(adapter_acts_on="masks", known_tokens_are_causal=True), 3, pack=False)
    with_it = TrainableModel(transformer, AdapterParameters(transformer, rank=2, alpha=2.0, successor=4))
    without = TrainableModel(transformer, AdapterParameters(transformer, rank=2, alpha=2.0))
    random = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(with_it.adapter.successor["outer"], generator=random)
    document = Document((5, 6, 7, 8, 9, 10, 11, 12), 2)

    def total(model, plain):
        settings = ConversionSettings(
            block_lengths=(2,), blocks_per_document=99, partial=0.0, decay=1e9, distill=0.0, plain=plain
        )
        return convert_adapter(settings)(model, pack([document], [0]), SampleNoise(0)).total

    assert torch.equal(total(with_it, 1.0), total(without, 1.0))
    # blocks of one mask each, a forward each: behind the anchor comes the exact token, and the mask says what follows it
    expected = 0.0
    mask, ids = transformer.config.mask_token_id, torch.tensor(document.ids)
    for anchor in range(document.num_prompt - 1, len(ids) - 2):
        tokens = torch.cat((ids[: anchor + 1], torch.tensor([mask])))
        attend = PackedAttention([BlockOverCausal(anchor + 1)], (len(tokens),), "sdpa", torch.device("cpu"))
        hidden = with_it(tokens, torch.arange(len(tokens)), attend, adapted=torch.tensor([anchor + 1]))[-1]
        changed = with_it.successor.changed(hidden, with_it.embed(ids[anchor + 1]))
        expected -= with_it.logits(changed[None])[0].log_softmax(-1)[ids[anchor + 2]]
    loss = total(with_it, 0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in with_it.adapter.successor.values())


def test_drafts_that_match_are_those_that_the_draft_head_makes():
    """Teacher-forced counting and the engine's own drafts agree, block by block."""
    shape = {"block_predicts": "next", "adapter_acts_on": "masks", "known_tokens_are_causal": True}
    config = tiny_config(**shape)
    transformer = random_transformer(config, 3, pack=False)
    model = TrainableModel(transformer, AdapterParameters(transformer, rank=2, alpha=2.0, successor=4)).eval()
    torch.nn.init.normal_(model.adapter.successor["outer"], generator=torch.Generator().manual_seed(0))
    library = LanguageModel("tiny", transformer, adapter=model.adapter.lora().each(torch.Tensor.detach))
    knobs = {"max_new_tokens": 30, "ignore_eos": True}
    prompt = [5, 6]
    text = library.generate(prompt, mode="ar", **knobs).token_ids
    batch = pack([Document((*prompt, *text), len(prompt))], [0])
    right, _ = drafts_that_match(model, batch, block_length=4, blocks_per_document=99)
    matched = right.long().cumprod(dim=1).sum(dim=1).tolist()
    place = rounds = 0
    while place < len(text):
        left = len(text) - place
        place += 2 + matched[place] if left > 2 else left
        rounds += 1
    out = library.generate(prompt, mode="self_spec", self_spec_kind="linear", block_length=4, **knobs)
    assert out.token_ids == text
    assert abs(out.stats.nfe_decode + out.stats.nfe_prefill - 2 * rounds) <= 2
