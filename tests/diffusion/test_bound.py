"""Both ways to draw masks have the mean over all orders of revealing, and tell their own error."""

import itertools
import statistics

import pytest
import torch

from trimode.diffusion.bound import combine, draw_by_count, draw_by_time
from trimode.errors import SettingError

PLACES = 5
SETS = [s for k in range(1, PLACES + 1) for s in itertools.combinations(range(PLACES), k)]


def place_loss(place, masked):
    """Some -log p of one place that hangs on what else is masked."""
    return 0.3 + 0.7 * place + 0.11 * len(masked) ** 1.5 + 0.2 * ((sum(masked) * 7 + place * 3) % 5)


LOSSES = {s: sum(place_loss(i, s) for i in s) for s in SETS}


def mean_over_orders():
    total = 0.0
    orders = list(itertools.permutations(range(PLACES)))
    for order in orders:
        total += sum(place_loss(place, tuple(sorted(order[j:]))) for j, place in enumerate(order))
    return total / len(orders)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_sets_by_count_give_the_mean_over_all_orders_without_error():
    for samples in (None, 10):
        estimate = combine(draw_by_count(PLACES, samples, random()), LOSSES)
        assert estimate.value == pytest.approx(mean_over_orders(), rel=1e-12)
        assert estimate.standard_error == 0.0


@pytest.mark.parametrize("draw", [draw_by_count, draw_by_time])
def test_estimates_scatter_about_the_mean_by_their_standard_error(draw):
    samples = 3 if draw is draw_by_count else 40
    estimates = [combine(draw(PLACES, samples, random(seed)), LOSSES) for seed in range(400)]
    spread = statistics.stdev(e.value for e in estimates)
    # 400 runs: the mean lies within four of its own errors but once in 16,000 sound programs
    assert abs(statistics.mean(e.value for e in estimates) - mean_over_orders()) < 4 * spread / 20 + 1e-3
    told = statistics.mean(e.variance for e in estimates) ** 0.5
    assert told == pytest.approx(spread, rel=0.15)


def test_drawing_count_by_count_is_less_noisy_for_the_same_forwards():
    by_count = statistics.mean(combine(draw_by_count(PLACES, 2, random(s)), LOSSES).variance for s in range(50))
    by_time = statistics.mean(combine(draw_by_time(PLACES, 2 * PLACES, random(s)), LOSSES).variance for s in range(50))
    assert by_count < by_time / 4


@pytest.mark.parametrize("samples", [0, 1, True, 2.0])
def test_too_few_samples_are_refused(samples):
    with pytest.raises(SettingError, match="at least 2"):
        draw_by_count(4, samples, random())
