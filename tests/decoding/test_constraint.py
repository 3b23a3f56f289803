"""A constraint on the answer holds in every mode, and self-speculation under one gives what one token at a time gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import EOS, MASK, random_lora, tiny_config, tiny_model
from trimode.engine.request import Request
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


class Ladder:
    """Stands for a grammar: each token is one to three rungs above the one before it, and at the top the text must end."""

    TOP = 36

    def start(self):
        return self

    def allowed(self, answer):
        mask = torch.zeros(40, dtype=torch.bool)
        if EOS in answer or (answer and answer[-1] >= self.TOP):
            mask[EOS] = True
            return mask
        first = answer[-1] + 1 if answer else MASK + 1
        mask[first : first + 3] = True
        return mask


EXACT = [
    {"mode": "ar"},
    {"mode": "self_spec", "block_length": 5},
    {"mode": "self_spec", "block_length": 5, "threshold": 0.6},
    {"mode": "self_spec", "self_spec_kind": "quadratic", "block_length": 3},
    {"mode": "self_spec", "self_spec_kind": "lookup", "block_length": 3},
]
KNOBS = [
    *EXACT,
    {"mode": "diffusion", "threshold": 0.4, "block_length": 6},
    {"mode": "diffusion", "max_denoising_steps": 2, "block_length": 5},
    {"mode": "diffusion", "temperature": 1.0, "block_length": 5},
    {"mode": "self_spec", "temperature": 1.0, "block_length": 5},
    {"mode": "self_spec", "temperature": 1.0, "self_spec_kind": "quadratic", "block_length": 3},
    {"mode": "self_spec", "temperature": 1.0, "self_spec_kind": "lookup", "block_length": 3},
]


def by_hand(model, prompt, num):
    """The greedy answer, from whole forwards and the rule alone."""
    answer = []
    while len(answer) < num and EOS not in answer:
        scores = model.logits([*prompt, *answer])[-1]
        scores[MASK] = float("-inf")
        scores[~Ladder().allowed(answer)] = float("-inf")
        answer.append(int(scores.argmax()))
    return answer


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(MODELS), st.lists(st.integers(0, 39), min_size=1, max_size=6), st.integers(1, 40))
def test_greedy_self_speculation_under_a_constraint_is_greedy_autoregression_under_it(model, prompt, num):
    expected = by_hand(model, prompt, num)
    for knobs in EXACT:
        assert model.generate(prompt, grammar=Ladder(), max_new_tokens=num, **knobs).token_ids == expected


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(MODELS),
    st.lists(st.integers(0, 39), min_size=1, max_size=6),
    st.lists(st.sampled_from(KNOBS), min_size=1, max_size=5),
)
def test_every_answer_obeys_its_constraint_in_every_mode(model, prompt, knobs):
    requests = [Request(prompt, max_new_tokens=40, seed=i, **k) for i, k in enumerate(knobs)]
    for out in model.generate(requests, grammar=Ladder()):
        for i, token in enumerate(out.token_ids):
            assert bool(Ladder().allowed(out.token_ids[:i])[token])
        assert out.finish_reason == "stop"


def test_without_the_constraint_the_answers_are_others():
    assert MODELS[0].generate([5, 6], mode="ar").token_ids != by_hand(MODELS[0], [5, 6], 40)


def test_what_a_constraint_forbids_is_never_drafted():
    drafted = []
    MODELS[0].generate(
        [5],
        mode="self_spec",
        grammar=Ladder(),
        observe=lambda g, step, outcome: drafted.append([*g.new_tokens, *g.canvas]) if step.kind == "draft" else None,
    )
    assert drafted
    for answer in drafted:
        for i, token in enumerate(answer):
            assert bool(Ladder().allowed(answer[:i])[token])


def test_sampled_self_speculation_under_a_constraint_has_the_distribution_of_autoregression():
    """Two tokens over the at most nine allowed pairs, 600 draws: chi-square with at most 8 degrees; alarm by chance once in 1e6."""
    model = MODELS[0]
    p = {}
    first = _law(model, [5], [])
    for a, pa in first.items():
        for b, pb in _law(model, [5, a], [a]).items():
            p[a, b] = pa * pb
    seen = dict.fromkeys(p, 0)
    num = 600
    requests = [Request([5], mode="self_spec", temperature=1.0, seed=i, max_new_tokens=2) for i in range(num)]
    for out in model.generate(requests, grammar=Ladder(), block_length=4):
        seen[tuple(out.token_ids)] += 1
    chi = sum((seen[k] - num * p[k]) ** 2 / (num * p[k]) for k in p)
    assert chi < 42.7


def _law(model, ids, answer):
    scores = model.logits(ids)[-1].double()
    scores[~Ladder().allowed(answer)] = float("-inf")
    p = scores.softmax(-1)
    return {int(t): float(p[t]) for t in p.nonzero()[:, 0]}


@pytest.mark.parametrize(
    "knobs",
    [
        {"ignore_eos": True},
        {"mode": "diffusion", "editing_threshold": 0.5},
        {"mode": "diffusion", "unmasking": "random"},
        {"max_thinking_tokens": 3, "end_think_token_id": 9},
    ],
    ids=str,
)
def test_knobs_that_contradict_a_constraint_are_named(knobs):
    with pytest.raises(SettingError, match=next(iter(k for k in knobs if k != "mode"))):
        MODELS[0].generate([5], grammar=Ladder(), **knobs)
