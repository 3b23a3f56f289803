"""Log-probabilities are the model's own: in the exact modes they add up to its score; and penalties that look at the answer."""

import pytest
import torch

from tests.worlds import MASK, random_lora, tiny_config, tiny_model
from trimode.errors import SettingError

MODELS = [
    tiny_model(1, lora=random_lora(tiny_config())),
    tiny_model(
        2,
        lora=random_lora(tiny_config()),
        block_predicts="next",
        known_tokens_are_causal=True,
        adapter_acts_on="masks",
    ),
]
EXACT = [
    {"mode": "ar"},
    {"mode": "ar", "temperature": 1.5, "seed": 1, "logit_bias": {9: 3.0}, "presence_penalty": 1.0},
    {"mode": "self_spec", "block_length": 5},
    {"mode": "self_spec", "temperature": 0.8, "seed": 3},
    {"mode": "self_spec", "self_spec_kind": "quadratic", "block_length": 3},
    {"mode": "self_spec", "self_spec_kind": "lookup", "block_length": 3},
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("knobs", EXACT, ids=str)
def test_in_the_exact_modes_they_are_those_of_one_causal_forward(model, knobs):
    out = model.generate([5, 6, 7], max_new_tokens=17, ignore_eos=True, logprobs=3, **knobs)
    rows = model.logits([5, 6, 7, *out.token_ids]).log_softmax(-1)[2:-1]
    assert [t.token for t in out.logprobs] == out.token_ids
    for told, row in zip(out.logprobs, rows, strict=True):
        # 1e-4: float32 through two layers, once in pieces and once whole
        assert told.logprob == pytest.approx(float(row[told.token]), abs=1e-4)
        assert [t for t, _ in told.best] == row.topk(3).indices.tolist()
    total = model.score([5, 6, 7, *out.token_ids]) - model.score([5, 6, 7])
    assert sum(t.logprob for t in out.logprobs) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("knobs", [{}, {"threshold": 0.2}, {"editing_threshold": 0.1, "max_post_steps": 2}], ids=str)
def test_in_diffusion_each_token_has_that_of_the_pass_that_filled_it(model, knobs):
    out = model.generate([5, 6, 7], mode="diffusion", max_new_tokens=11, ignore_eos=True, logprobs=0, **knobs)
    assert [t.token for t in out.logprobs] == out.token_ids
    assert all(-30 < t.logprob < 0 and t.best == () for t in out.logprobs)


def test_they_are_told_only_if_asked_and_only_for_what_is_in_the_answer():
    model = MODELS[0]
    assert model.generate([5], mode="ar").logprobs is None
    pieces = list(model.stream([5], mode="self_spec", max_new_tokens=9, ignore_eos=True, logprobs=1))
    streamed = [t.token for e in pieces for t in e.logprobs]
    assert streamed == pieces[-1].output.token_ids
    with pytest.raises(SettingError, match="21"):
        model.generate([5], logprobs=21)


def test_presence_and_frequency_penalties_look_at_the_answer_alone():
    model = MODELS[0]
    answer = []
    for _ in range(12):
        scores = model.logits([5, 5, *answer])[-1]
        scores[MASK] = float("-inf")
        for token in set(answer):
            scores[token] -= 0.7 + 0.4 * answer.count(token)
        answer.append(int(scores.argmax()))
    knobs = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "max_new_tokens": 12, "ignore_eos": True}
    for mode in ("ar", "self_spec"):
        assert model.generate([5, 5], mode=mode, **knobs).token_ids == answer
    assert model.generate([5, 5], mode="ar", max_new_tokens=12, ignore_eos=True).token_ids != answer
    torch.manual_seed(0)
    model.generate([5, 5], mode="diffusion", **knobs)
