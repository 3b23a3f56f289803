"""The objectives over [noisy | clean], against one forward a block and sums written out."""

import pytest
import torch

from tests.worlds import MASK, random_transformer, tiny_config
from trimode.diffusion.corruption import SampleNoise
from trimode.model.attention import SelfAttention
from trimode.model.views import BlockOverCausal, Causal
from trimode.training.data import Document, pack
from trimode.training.joint import JointSettings, autoregressive, corrupt, diffusion, joint
from trimode.training.trainable import TrainableModel

B = 4
DOCUMENTS = [
    Document(tuple(int(x) for x in torch.randint(4, 40, (n,), generator=torch.Generator().manual_seed(n))), given)
    for n, given in [(11, 3), (8, 0), (14, 5)]
]


@pytest.fixture
def model():
    return TrainableModel(random_transformer(tiny_config(), 3, pack=False))


def logprobs(model, ids, view):
    hidden = model(torch.tensor(ids), torch.arange(len(ids)), SelfAttention(view, 1, len(ids), "plain", "cpu"))
    return model.logits(hidden).log_softmax(-1)


def written_out(model, batch, noisy):
    """Sum and count of both losses, block by block: each noisy block over the clean text before it."""
    diffusion = ar = num_ar = 0
    for document, start in zip(DOCUMENTS, batch.starts, strict=True):
        ids, n = list(document.ids), len(document.ids)
        own = noisy.tokens[start : start + n].tolist()
        for first in range(0, n, B):
            block = own[first : first + B]
            rows = logprobs(model, ids[:first] + block, BlockOverCausal(first))
            for i in range(len(block)):
                diffusion = diffusion - rows[first + i, ids[first + i]] * noisy.weight[start + first + i]
        rows = logprobs(model, ids, Causal())
        for i in range(max(document.num_prompt, 1), n):
            ar = ar - rows[i - 1, ids[i]]
            num_ar += 1
    return diffusion, ar, num_ar


@pytest.mark.parametrize("planted", [0.0, 0.4])
def test_the_joint_loss_is_that_of_every_block_over_its_clean_past(model, planted):
    batch = pack(DOCUMENTS, [5, 6, 7])
    noisy = corrupt(model, batch, SampleNoise(1), planted)
    expected, ar, num_ar = written_out(model, batch, noisy)
    num = int((noisy.weight > 0).sum())
    settings = JointSettings(diffusion_weight=0.3, planted_errors=planted)
    loss = joint(settings, B)(model, batch, SampleNoise(1))
    torch.testing.assert_close(loss.total, ar + 0.3 * expected, rtol=1e-4, atol=1e-3)
    assert loss.count == num + num_ar
    alone = diffusion(settings, B)(model, batch, SampleNoise(1))
    torch.testing.assert_close(alone.total, expected, rtol=1e-4, atol=1e-3)
    assert alone.count == num
    causal = autoregressive()(model, batch, SampleNoise(1))
    torch.testing.assert_close(causal.total, ar, rtol=1e-4, atol=1e-3)
    assert causal.count == num_ar


def test_gradients_are_those_of_the_written_out_loss(model):
    batch = pack(DOCUMENTS, [5, 6, 7])
    noisy = corrupt(model, batch, SampleNoise(1), 0.0)
    expected, ar, _ = written_out(model, batch, noisy)
    wanted = torch.autograd.grad(ar + 0.3 * expected, list(model.transformer.parameters()))
    loss = joint(JointSettings(), B)(model, batch, SampleNoise(1))
    got = torch.autograd.grad(loss.total, list(model.transformer.parameters()))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_noise_is_the_same_however_the_batch_is_split_and_spares_what_is_given(model):
    whole = corrupt(model, pack(DOCUMENTS, [5, 6, 7]), SampleNoise(1), 0.3)
    parts = [corrupt(model, pack([d], [i]), SampleNoise(1), 0.3) for d, i in zip(DOCUMENTS, [5, 6, 7], strict=True)]
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
    assert torch.equal(whole.weight, torch.cat([p.weight for p in parts]))
    start = 0
    for document in DOCUMENTS:
        n = document.num_prompt
        assert whole.tokens[start : start + n].tolist() == list(document.ids[:n])
        start += len(document.ids)
    assert (whole.tokens == MASK).equal(whole.masked)


def test_the_weighted_loss_is_unbiased_for_the_sum_over_mask_ratios(model):
    # E[sum over masked / p] = number of tokens: each is masked with probability p
    batch = pack([DOCUMENTS[1]], [0])
    sums = []
    for sample in range(4000):
        noisy = corrupt(model, pack([DOCUMENTS[1]], [sample]), SampleNoise(2), 0.0)
        sums.append(float(noisy.weight.sum()))
    mean = torch.tensor(sums)
    n = batch.lengths[0]
    assert abs(float(mean.mean()) - n) < 4 * float(mean.std()) / len(sums) ** 0.5
