"""Law 8: corruption hits its rate, touches nothing it may not, and is the same for any number of ranks, any split and any resume."""

import math

import pytest
import torch

from tests.worlds import MASK, random_transformer, tiny_config
from trimode.diffusion.corruption import SMALLEST_RATIO, SampleNoise, mask_uniformly, plant_errors
from trimode.training.data import Document, Mixture, pack
from trimode.training.joint import corrupt
from trimode.training.trainable import TrainableModel

NUM = 20_000


def within(hits: int, num: int, rate: float) -> bool:
    """Five standard deviations: a false alarm in two million runs, and the seeds are fixed."""
    return abs(hits - num * rate) <= 5 * math.sqrt(num * rate * (1 - rate))


def test_masks_hit_the_ratio_that_was_drawn_and_ratios_are_uniform():
    ratios = []
    for sample in range(400):
        masked, p = mask_uniformly(torch.ones(500, dtype=torch.bool), SampleNoise(1).of(sample))
        assert within(int(masked.sum()), 500, p)
        assert SMALLEST_RATIO <= p <= 1
        ratios.append(p)
    for quarter in (0.25, 0.5, 0.75):
        assert within(sum(p < quarter for p in ratios), 400, quarter)


def test_a_mask_never_falls_where_it_may_not():
    may = torch.arange(1000) % 3 > 0
    masked, _ = mask_uniformly(may, SampleNoise(0).of(0))
    assert masked.any()
    assert not (masked & ~may).any()


@pytest.mark.parametrize("ratio", [0.02, 0.3])
def test_planted_errors_hit_their_ratio_are_wrong_and_are_spread_over_the_vocabulary(ratio):
    tokens = torch.randint(0, 40, (NUM,), generator=torch.Generator().manual_seed(0))
    may = torch.arange(NUM) >= NUM // 2
    noisy, hit = plant_errors(tokens, may, ratio, 40, MASK, SampleNoise(0).of(7))
    assert within(int(hit.sum()), NUM // 2, ratio)
    assert not hit[: NUM // 2].any()
    assert torch.equal(noisy != tokens, hit)
    assert not (noisy[hit] == MASK).any()
    # 38 other tokens, the ones behind the two that are left out drawn twice as often
    assert len(noisy[hit].unique()) == 39
    assert within(int((noisy[hit] == 20).sum()), int(hit.sum()), (1 + 1 / 40) / 40)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("per_forward", [1, 2])
def test_noise_and_data_are_the_same_for_any_ranks_any_split_and_any_resume(num_ranks, per_forward):
    model = TrainableModel(random_transformer(tiny_config(), 1, pack=False))
    random = torch.Generator().manual_seed(3)
    documents = [Document(tuple(torch.randint(4, 40, (12 + i,), generator=random).tolist()), 2 + i) for i in range(10)]
    global_batch, steps = 8, 3

    def run(ranks: int, size: int, first_step: int = 0) -> dict[int, list[int]]:
        seen = {}
        for step in range(first_step, steps):
            data, noise = Mixture([(documents, 1.0)], seed=5), SampleNoise(5)  # made anew, as after a resume
            share = global_batch // ranks
            for rank in range(ranks):
                begin = step * global_batch + rank * share
                for start in range(begin, begin + share, size):
                    samples = range(start, min(start + size, begin + share))
                    batch = pack([data[i] for i in samples], samples)
                    noisy = corrupt(model, batch, noise, 0.2)
                    for i, own in zip(samples, noisy.tokens.split(list(batch.lengths)), strict=True):
                        seen[i] = own.tolist()
        return seen

    reference = run(1, global_batch)
    assert run(num_ranks, per_forward) == reference
    resumed = run(num_ranks, per_forward, first_step=2)
    assert resumed == {i: reference[i] for i in range(2 * global_batch, 3 * global_batch)}
    # the same document meets other noise in the next pass
    data = Mixture([(documents, 1.0)], seed=5)
    again = [i for i in range(24) if data[i] == data[0]]
    assert len(again) > 1
    assert len({tuple(reference[i]) for i in again}) == len(again)
