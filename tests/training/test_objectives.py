"""The conversion objective, its attention and its head, against the same things written out."""

import pytest
import torch

from trimode.diffusion.corruption import SampleNoise
from trimode.training.data import Document, Mixture
from trimode.training.head import head_statistics
from trimode.training.objectives import cross_entropy_and_distance
from trimode.training.optim import learning_rate


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
