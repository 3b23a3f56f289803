"""Both likelihoods equal sums written out over a tiny model, for every kind of checkpoint."""

import itertools

import pytest
import torch

import trimode
from tests.evaluation.block_view import KINDS, block_row, kind_of_model, logprob
from tests.evaluation.speaking import speaking_model
from tests.worlds import MASK, tiny_model
from trimode.errors import PromptError, SettingError
from trimode.evaluation.likelihood import autoregressive_score, diffusion_score
from trimode.model import native

CONTEXT = [5, 6, 7]
TARGET = [8, 19, 10, 11, 32, 13, 14, 5, 16, 30]


def mean_over_orders(model, final, tokens):
    """log p of a block's tokens, averaged over all orders of revealing them one at a time."""
    total = 0.0
    orders = list(itertools.permutations(range(len(tokens))))
    for order in orders:
        canvas = [MASK] * len(tokens)
        for place in order:
            total += logprob(block_row(model, final, canvas, place), tokens[place])
            canvas[place] = tokens[place]
    return total / len(orders)


@pytest.mark.parametrize("kind", KINDS)
def test_the_autoregressive_score_is_the_sum_over_causal_rows(kind):
    model = kind_of_model(kind)
    score = autoregressive_score(model, CONTEXT, TARGET)
    rows = model.logits(CONTEXT + TARGET)
    for i, token in enumerate(TARGET):
        assert score.logprobs[i] == pytest.approx(logprob(rows[len(CONTEXT) + i - 1], token), abs=1e-4)
    assert not score.is_greedy
    greedy = model.generate(CONTEXT, mode="ar", max_new_tokens=5, ignore_eos=True).token_ids
    assert autoregressive_score(model, CONTEXT, greedy).is_greedy


@pytest.mark.parametrize("kind", KINDS)
def test_the_diffusion_bound_is_the_mean_over_all_orders_block_by_block(kind):
    model = kind_of_model(kind)
    text = CONTEXT + TARGET
    rows = model.logits(text)
    expected = exact = 0.0
    for start in range(len(CONTEXT), len(text), 4):
        first = logprob(rows[start - 1], text[start])
        exact += first
        expected += first
        if start + 1 < len(text):
            expected += mean_over_orders(model, text[: start + 1], text[start + 1 : start + 4])
    score = diffusion_score(model, CONTEXT, TARGET, block_length=4, samples=None)
    assert score.total == pytest.approx(expected, abs=2e-4)
    assert score.exact == pytest.approx(exact, abs=1e-4)
    assert score.standard_error == 0.0
    assert score.num_forwards == 7 + 7 + 1


@pytest.mark.parametrize("method", ["counts", "times"])
def test_estimates_lie_about_the_exact_bound(method):
    model = kind_of_model("gated adapter")
    exact = diffusion_score(model, CONTEXT, TARGET, block_length=6, samples=None).total
    for seed in range(3):
        score = diffusion_score(
            model, CONTEXT, TARGET, block_length=6, samples=3 if method == "counts" else 60, method=method, seed=seed
        )
        assert score.standard_error > 0
        # five errors; with so few draws an error is itself uncertain by a third
        assert abs(score.total - exact) < 5 * score.standard_error


def test_the_gated_adapter_changes_the_bound_and_never_the_exact_score():
    model = kind_of_model("gated adapter")
    with_it = diffusion_score(model, CONTEXT, TARGET, samples=None)
    without = diffusion_score(model, CONTEXT, TARGET, samples=None, knobs={"draft_lora": False})
    assert abs(with_it.total - without.total) > 1e-2
    assert with_it.exact == without.exact


def test_blocks_of_length_one_are_exact():
    model = kind_of_model("its own place")
    score = diffusion_score(model, CONTEXT, TARGET, block_length=1)
    assert score.total == pytest.approx(autoregressive_score(model, CONTEXT, TARGET).total, abs=1e-6)
    assert (score.standard_error, score.num_forwards) == (0.0, 0)


def test_the_bound_lies_below_the_likelihood_of_a_block_by_enumeration():
    """Over a whole tiny vocabulary: exp of the bound, summed over every text of two tokens, is at most one."""
    model = tiny_model(vocab_size=6, mask_token_id=3, eos_token_ids=(2,))
    total = sum(
        torch.tensor(diffusion_score(model, [5], [5, a, b], block_length=3, samples=None).total).exp()
        / torch.tensor(autoregressive_score(model, [5], [5]).total).exp()
        for a in range(6)
        for b in range(6)
    )
    assert 0.1 < float(total) <= 1.0 + 1e-5


@pytest.mark.skipif(not native.available(), reason=native.WHY_MISSING)
@pytest.mark.parametrize("block_length", [4, 7])
def test_the_native_engine_gives_the_same_scores(tmp_path, block_length):
    """Its cache lies in pieces of 16 positions, which a text of 40 crosses at every offset."""
    model = speaking_model()
    model.save(tmp_path / "m")
    other = trimode.load(tmp_path / "m", dtype="float32", backend="native")
    assert other.forward.precision == "float32"
    text = [4 + (7 * i) % 30 for i in range(40)]
    for num_context in (1, 15, 17):
        sides = text[:num_context], text[num_context:]
        exact = [autoregressive_score(m, *sides).total for m in (model, other)]
        bounds = [diffusion_score(m, *sides, samples=3, block_length=block_length).total for m in (model, other)]
        assert exact[0] == pytest.approx(exact[1], abs=2e-3)
        assert bounds[0] == pytest.approx(bounds[1], abs=2e-3)


def test_mistakes_are_told():
    model = kind_of_model("its own place")
    with pytest.raises(PromptError, match="context has no tokens"):
        autoregressive_score(model, [], TARGET)
    with pytest.raises(PromptError, match="continuation has no tokens"):
        diffusion_score(model, CONTEXT, [])
    with pytest.raises(SettingError, match="counts"):
        diffusion_score(model, CONTEXT, TARGET, method="both")
    with pytest.raises(SettingError, match="at least 2"):
        diffusion_score(model, CONTEXT, TARGET, samples=1)
