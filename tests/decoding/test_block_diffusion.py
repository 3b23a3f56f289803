"""Block diffusion: policies, revision, early stops, limits, thinking budgets, infilling."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import EOS, MASK, random_lora, random_tensors, tiny_config, tiny_model
from trimode.decoding.block_diffusion import BlockDiffusion
from trimode.decoding.unmasking import POLICIES, Candidates, quota
from trimode.engine.language_model import LanguageModel
from trimode.model.forward import TorchForward
from trimode.model.transformer import Transformer

MODEL = tiny_model(2)


def candidates(rows, **changes):
    p = torch.tensor(rows)
    values = {
        "confidence": p.amax(-1),
        "scores": p.log,
        "quota": 2,
        "threshold": 0.9,
        "entropy_bound": 0.5,
        "random": torch.Generator().manual_seed(0),
    }
    return Candidates(**{**values, **changes})


ROWS = [[0.95, 0.05, 0.0], [0.5, 0.49, 0.01], [0.91, 0.05, 0.04], [0.6, 0.2, 0.2]]


@pytest.mark.parametrize(
    ("policy", "changes", "expected"),
    [
        ("threshold", {}, [True, False, True, False]),
        ("threshold", {"threshold": 0.99}, [True, False, False, False]),
        ("threshold", {"threshold": 0.0}, [True, True, True, True]),
        ("fixed", {"quota": 1}, [True, False, False, False]),
        ("fixed", {"quota": 3}, [True, False, True, True]),
        ("margin", {"threshold": 0.88}, [True, False, False, False]),
        ("margin", {"threshold": 0.3}, [True, False, True, True]),
        ("leftmost", {}, [True, False, False, False]),
        ("leftmost", {"threshold": 0.4}, [True, True, True, True]),
        ("entropy_bound", {"entropy_bound": 0.0}, [True, False, False, False]),
        ("entropy_bound", {"entropy_bound": 0.25}, [True, False, True, False]),
        ("entropy_bound", {"entropy_bound": 100.0}, [True, True, True, True]),
    ],
)
def test_each_policy_fills_what_its_rule_says(policy, changes, expected):
    assert POLICIES[policy](candidates(ROWS, **changes)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=9),
    policy=st.sampled_from(sorted(POLICIES)),
    threshold=st.floats(0, 1),
)
def test_every_policy_fills_at_least_one_place(rows, policy, threshold):
    normalised = [[x / sum(row) for x in row] for row in rows]
    fill = POLICIES[policy](candidates(normalised, threshold=threshold, quota=1))
    assert fill.any()


def test_ties_go_to_the_leftmost_place():
    assert POLICIES["fixed"](candidates([[0.5, 0.5, 0.0]] * 4, quota=1)).tolist() == [True, False, False, False]


def test_a_threshold_is_compared_in_the_models_dtype():
    # 0.9 rounds to 0.8984375 in bfloat16, so a confidence of 0.8984375 passes there
    confidence = torch.tensor([0.99, 0.8984375], dtype=torch.bfloat16)
    assert POLICIES["threshold"](candidates([[0.99, 0.01], [0.9, 0.1]], confidence=confidence)).tolist() == [True, True]
    assert POLICIES["threshold"](candidates([[0.99, 0.01], [0.9, 0.1]], confidence=confidence.float())).tolist() == [
        True,
        False,
    ]


@given(st.integers(1, 64), st.integers(1, 64))
def test_quotas_of_a_schedule_add_up(num_masked, num_steps):
    assert sum(quota(num_masked, num_steps, step) for step in range(num_steps)) == num_masked


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=8),
    policy=st.sampled_from(sorted(POLICIES)),
    block_length=st.integers(1, 9),
    max_new_tokens=st.integers(1, 20),
    cap=st.none() | st.integers(1, 4),
    predicts=st.sampled_from(["self", "next"]),
)
def test_any_length_is_answered_without_masks_and_within_the_cap(
    prompt, policy, block_length, max_new_tokens, cap, predicts
):
    model = tiny_model(2, block_predicts=predicts)
    steps = []
    out = model.generate(
        prompt,
        mode="diffusion",
        unmasking=policy,
        block_length=block_length,
        max_new_tokens=max_new_tokens,
        max_denoising_steps=cap,
        observe=lambda g, step, outcome: steps.append(step.kind),
    )
    assert MASK not in out.token_ids
    assert len(out.token_ids) == max_new_tokens or out.token_ids[-1] == EOS
    assert EOS not in out.token_ids[:-1]
    runs = "".join("d" if kind == "denoise" else "|" for kind in steps).split("|")
    assert max(map(len, runs)) <= (cap or block_length)


def test_blocks_of_one_token_are_autoregression_at_its_cost():
    ar = MODEL.generate([5, 6], mode="ar", max_new_tokens=12)
    out = MODEL.generate([5, 6], mode="diffusion", block_length=1, max_new_tokens=12)
    assert out.token_ids == ar.token_ids
    assert out.stats.nfe_decode == ar.stats.nfe_decode


def test_a_shorter_limit_gives_a_prefix_of_the_longer_answer():
    longer = MODEL.generate([5, 6, 7], mode="diffusion", block_length=8, max_new_tokens=24, ignore_eos=True)
    for n in (1, 2, 7, 9, 17):
        shorter = MODEL.generate([5, 6, 7], mode="diffusion", block_length=8, max_new_tokens=n, ignore_eos=True)
        assert shorter.token_ids == longer.token_ids[:n]


def test_revision_replaces_tokens_of_the_current_block_and_says_how_many():
    plain = MODEL.generate(
        [5, 6, 7], mode="diffusion", block_length=8, threshold=0.2, max_new_tokens=32, ignore_eos=True
    )
    assert plain.stats.revised == 0
    seen = []
    revising = MODEL.generate(
        [5, 6, 7],
        mode="diffusion",
        block_length=8,
        threshold=0.2,
        editing_threshold=0.05,
        max_post_steps=3,
        max_new_tokens=32,
        ignore_eos=True,
        observe=lambda g, step, outcome: seen.append((step.kind, outcome.revised, list(g.canvas))),
    )
    assert revising.stats.revised > 0
    assert revising.stats.revised == sum(revised for _, revised, _ in seen)
    assert revising.token_ids != plain.token_ids
    post = [kind for kind, _, _ in seen if kind == "revise"]
    assert 0 < len(post) <= 3 * 4


def test_an_editing_threshold_that_nothing_reaches_changes_nothing_but_asks_nothing_extra():
    plain = MODEL.generate([5, 6, 7], mode="diffusion", block_length=8, max_new_tokens=16, ignore_eos=True)
    editing = MODEL.generate(
        [5, 6, 7], mode="diffusion", block_length=8, max_new_tokens=16, ignore_eos=True, editing_threshold=1.0
    )
    assert editing.token_ids == plain.token_ids
    assert editing.stats.nfe_decode == plain.stats.nfe_decode


def test_committed_blocks_are_never_revised():
    finals = []
    MODEL.generate(
        [5, 6, 7],
        mode="diffusion",
        block_length=4,
        editing_threshold=0.01,
        max_post_steps=2,
        max_new_tokens=24,
        ignore_eos=True,
        observe=lambda g, step, outcome: finals.append(list(g.final)),
    )
    for earlier, later in itertools.pairwise(finals):
        assert later[: len(earlier)] == earlier


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_spec"])
@pytest.mark.parametrize("budget", [0, 1, 3, 5, 8, 11])
def test_a_thinking_budget_puts_the_end_of_thinking_in_once_and_in_place(mode, budget):
    knobs = {} if mode == "ar" else {"block_length": 4}
    out = MODEL.generate(
        [5, 6, 7],
        mode=mode,
        max_new_tokens=16,
        ignore_eos=True,
        max_thinking_tokens=budget,
        end_think_token_id=39,
        logit_bias={39: -100.0},
        **knobs,
    )
    assert out.token_ids.count(39) == 1
    assert out.token_ids.index(39) == budget


def test_infilling_keeps_the_fixed_places_and_fills_the_others():
    ids = [5, 6, None, None, 9, None, 11]
    out = MODEL.infill(ids)
    assert len(out.token_ids) == len(ids)
    for asked, token in zip(ids, out.token_ids, strict=True):
        assert token == asked if asked is not None else token not in (MASK, EOS)
    # fixed places never count as output
    assert (out.stats.tokens, out.stats.prompt_tokens) == (3, 4)
    assert out.stats.nfe_prefill == 1


@pytest.mark.parametrize("predicts", ["self", "next"])
def test_infilling_sees_what_stands_behind_the_span(predicts):
    model = tiny_model(2, block_predicts=predicts)
    answers = {tuple(model.infill([5, None, None, None, suffix, suffix]).token_ids[1:4]) for suffix in range(4, 40)}
    assert len(answers) > 1


def test_infilling_at_the_very_start_leads_with_the_token_that_begins_a_text():
    out = MODEL.infill([None, None, 7])
    assert out.token_ids[0] == 1
    assert out.token_ids[3] == 7


# ---- what is tried ----------------------------------------------------------------------------------------------------------

SIZE = 64
NEXT = {token: (7 * token + 3) % 40 + 4 for token in range(SIZE)}
KNOBS = {"mode": "diffusion", "max_new_tokens": 42, "ignore_eos": True}


class Head:
    """Drafts of our choice in place of the adapter's."""

    def __init__(self, drafted):
        self.drafted = drafted

    def draft(self, hidden, logits, before):
        return self.drafted(len(hidden), before)

    def rescored(self, hidden, logits, before):
        raise AssertionError("greedy drafts are made at once")


def chained_model(draft):
    """A model whose text is a chain: NEXT of a token stands behind it. `draft(count, before)`: tokens, and how sure each is."""
    config = tiny_config(
        vocab_size=SIZE,
        width=SIZE,
        block_length=6,
        block_predicts="next",
        known_tokens_are_causal=True,
        adapter_acts_on="masks",
    )
    tensors = dict(random_tensors(config))
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = torch.ones_like(tensor)
        if ".output." in name or ".down." in name:
            tensors[name] = torch.zeros_like(tensor)
    tensors["embedding.weight"] = torch.eye(SIZE)
    tensors["head.weight"] = torch.zeros(SIZE, SIZE)
    for token, after in NEXT.items():
        tensors["head.weight"][after, token] = 1.0
    transformer = Transformer(config)
    transformer.load(tensors.items())
    forward = TorchForward(transformer.eval(), lora=random_lora(config, successor=5))
    forward.draft_head = Head(draft)
    return LanguageModel("chained", forward)


def chain(before, count):
    tokens = []
    for _ in range(count):
        before = NEXT[before]
        tokens.append(before)
    return tokens


def test_what_is_tried_and_right_is_kept_and_costs_no_forward_of_its_own():
    model = chained_model(lambda count, before: (chain(before, count), [0.5] * count))
    out = model.generate([5, 9], **KNOBS)
    assert out.token_ids == chain(9, 42)
    # one token and five tried, then these five and one more: seven in two forwards
    assert out.stats.nfe_prefill + out.stats.nfe_decode == 2 * 42 // 7


def test_what_is_sure_is_final_untried_and_what_is_hopeless_is_not_tried():
    sure = chained_model(lambda count, before: ([MASK + 1] * count, [0.999] * count))
    out = sure.generate([5, 9], **KNOBS)
    assert out.token_ids[:7] == [NEXT[9], *[MASK + 1] * 5, NEXT[MASK + 1]]
    assert out.stats.nfe_prefill + out.stats.nfe_decode == 42 // 6
    hopeless = chained_model(lambda count, before: (chain(before, count), [0.5, 0.2, 0.9, 0.9, 0.9][:count]))
    out = hopeless.generate([5, 9], **KNOBS)
    # one, then the one that was tried, the exact one behind it and, since all was right, another to try
    assert out.token_ids == chain(9, 42)
    assert out.stats.nfe_prefill + out.stats.nfe_decode == 1 + 41 // 2 + 1


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_of_one_gives_the_autoregressive_text_whatever_is_tried(seed):
    noise = random.Random(seed)

    def draft(count, before):
        tokens = [token if noise.random() < 0.7 else noise.randrange(4, SIZE) for token in chain(before, count)]
        return tokens, [noise.uniform(0.1, 0.999) for _ in tokens]

    model = chained_model(draft)
    out = model.generate([5, 9], threshold=1.0, **KNOBS)
    assert out.token_ids == chain(9, 42) == model.generate([5, 9], **KNOBS | {"mode": "ar"}).token_ids
    assert out.stats.nfe_decode < 36


@pytest.mark.parametrize(
    "knobs",
    [{"max_denoising_steps": 6}, {"editing_threshold": 0.9}, {"temperature": 1.0, "seed": 3}, {"unmasking": "margin"}],
)
def test_what_hangs_on_more_than_the_text_before_tries_nothing(knobs, monkeypatch):
    model = chained_model(lambda count, before: (chain(before, count), [0.5] * count))
    monkeypatch.delattr(BlockDiffusion, "_check_and_try")
    assert len(model.generate([5, 9], **KNOBS, **knobs).token_ids) == 42
    with pytest.raises(AttributeError):
        model.generate([5, 9], **KNOBS)
