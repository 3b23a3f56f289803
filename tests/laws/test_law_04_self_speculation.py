"""Law 4: greedy self-speculation equals greedy autoregression, and sampled self-speculation has its distribution."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import EOS, random_lora, tiny_config, tiny_model
from trimode.decoding.interface import Rows
from trimode.decoding.reading import read
from trimode.decoding.sampling import adjusted, pick, truncated_distribution, uniform, verify
from trimode.engine.request import Request
from trimode.text.ngrams import count_ngrams


class OddBehindEven:
    """A constraint that hangs on the token before."""

    def allowed(self, answer):
        parity = answer[-1] % 2 if answer else 1
        return torch.arange(16) % 2 != parity

    def __repr__(self):
        return "odd behind even"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 5),
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=12),
    kind=st.sampled_from(("linear", "quadratic")),
    block_length=st.integers(1, 9),
    max_new_tokens=st.integers(1, 24),
    threshold=st.sampled_from([None, 0.3, 0.9]),
    predicts=st.sampled_from(["self", "next"]),
    causal_anchor=st.booleans(),
    adapter=st.sampled_from([None, "draft", "masks"]),
    successor=st.sampled_from([0, 5]),
    penalty=st.sampled_from([1.0, 1.3]),
    budget=st.sampled_from([None, 0, 3]),
)
def test_greedy_self_speculation_equals_greedy_autoregression(
    seed,
    prompt,
    kind,
    block_length,
    max_new_tokens,
    threshold,
    predicts,
    causal_anchor,
    adapter,
    successor,
    penalty,
    budget,
):
    lora = None if adapter is None else random_lora(tiny_config(), successor=successor)
    model = tiny_model(
        seed,
        lora=lora,
        block_predicts=predicts,
        known_tokens_are_causal=causal_anchor,
        adapter_acts_on=adapter or "draft",
    )
    common = {"max_new_tokens": max_new_tokens, "repetition_penalty": penalty}
    if budget is not None:
        common |= {"max_thinking_tokens": budget, "end_think_token_id": 7}
    knobs = {"self_spec_kind": kind, "block_length": block_length}
    if threshold is not None and kind == "linear":
        knobs["threshold"] = threshold
    expected = model.generate(prompt, mode="ar", **common)
    actual = model.generate(prompt, mode="self_spec", **knobs, **common)
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reason == expected.finish_reason
    assert actual.stats.tokens == len(actual.token_ids)
    if budget is not None and len(actual.token_ids) > budget and EOS not in actual.token_ids:
        assert 7 in actual.token_ids[: budget + 1]


EVERY_PAIR = [0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 0, 2, 0, 4, 0, 5, 1, 0, 1, 4, 1, 5, 2, 1, 2, 5, 4, 1, 5, 4, 2]
"""Whatever follows, the text suggests how it goes on."""


def chi_square(counts: Counter, probabilities: dict, total: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare outcomes pooled."""
    statistic, cells, rest_expected, rest_seen = 0.0, 0, 0.0, 0
    for outcome, probability in probabilities.items():
        expected = probability * total
        if expected < 8:
            rest_expected += expected
            rest_seen += counts[outcome]
        else:
            statistic += (counts[outcome] - expected) ** 2 / expected
            cells += 1
    if rest_expected > 0:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        cells += 1
    return statistic, cells - 1


def enumerate_autoregression(model, prompt, length, temperature, top_k=0, top_p=1.0):
    """Every text of `length` tokens with its exact probability, from the logits alone."""
    from trimode.decoding.sampling import truncated_distribution
    from trimode.decoding.settings import Settings

    knobs = Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    texts = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, probability in texts.items():
            logits = model.logits([*prompt, *text])[-1:]
            logits[:, model.config.mask_token_id] = float("-inf")
            p = truncated_distribution(logits, knobs)[0]
            for token in p.nonzero().flatten().tolist():
                longer[(*text, token)] = probability * float(p[token])
        texts = longer
    return texts


@pytest.mark.parametrize(
    ("kind", "truncation", "threshold", "successor"),
    [
        ("linear", {}, None, 0),
        ("linear", {"top_k": 3}, None, 0),
        ("linear", {"top_p": 0.8}, None, 0),
        ("linear", {}, 0.5, 0),
        ("linear", {}, None, 4),
        ("quadratic", {}, None, 0),
        ("quadratic", {"top_k": 3}, None, 0),
        ("quadratic", {"top_k": 3}, None, 4),
        ("lookup", {}, None, 0),
        ("lookup", {"top_k": 3}, None, 0),
    ],
)
def test_sampled_self_speculation_has_the_autoregressive_distribution(kind, truncation, threshold, successor):
    # six tokens, texts of three: 150 outcomes at most. False alarm: the statistic exceeds the bound with probability below 1e-5
    # (normal approximation at 4.3 standard deviations plus its skew); the seeds are fixed, so it either always passes or never.
    shape = {"vocab_size": 6, "eos_token_ids": (), "block_length": 3}
    lora = None
    if successor:
        shape |= {"block_predicts": "next", "known_tokens_are_causal": True, "adapter_acts_on": "masks"}
        lora = random_lora(tiny_config(**shape), successor=successor)
    model = tiny_model(3, weight_scale=0.25, lora=lora, **shape)
    prompt, length, temperature = EVERY_PAIR if kind == "lookup" else [1, 4], 3, 1.0
    exact = enumerate_autoregression(model, prompt, length, temperature, **truncation)
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-6)
    total = 4000
    knobs = {"threshold": threshold} if threshold is not None else {}
    requests = [Request(prompt, seed=seed) for seed in range(total)]
    counts: Counter = Counter()
    accepted = rounds = 0
    for start in range(0, total, 500):
        outs = model.generate(
            requests[start : start + 500],
            mode="self_spec",
            self_spec_kind=kind,
            max_new_tokens=length,
            temperature=temperature,
            **truncation,
            **knobs,
        )
        counts.update(tuple(out.token_ids) for out in outs)
        if kind == "lookup":
            assert any(out.stats.acceptance_length and out.stats.acceptance_length > 1 for out in outs)
        accepted += sum(out.stats.tokens for out in outs)
        rounds += sum(out.stats.nfe_decode for out in outs)
    statistic, freedom = chi_square(counts, exact, total)
    bound = freedom + 4.3 * math.sqrt(2 * freedom) + 10
    assert statistic < bound, (statistic, freedom)
    assert set(counts) <= set(exact)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 5),
    prompt=st.lists(st.integers(8, 11), min_size=1, max_size=16),
    block_length=st.integers(1, 9),
    max_new_tokens=st.integers(1, 40),
    common=st.sampled_from(
        [{}, {"repetition_penalty": 1.3}, {"logit_bias": {9: 1.0, 10: -1.0}}, {"frequency_penalty": 0.5}]
    ),
    budget=st.sampled_from([None, 0, 3]),
    weight_scale=st.sampled_from([0.05, 0.1]),
    table=st.one_of(st.none(), st.integers(0, 9)),
)
def test_greedy_lookups_in_texts_that_repeat_themselves_equal_greedy_autoregression(
    seed, prompt, block_length, max_new_tokens, common, budget, weight_scale, table
):
    """Whatever a table of n-grams says beside them."""
    ngrams = None
    if table is not None:
        said = tiny_model(seed, weight_scale=weight_scale).generate([8 + table % 4], max_new_tokens=30, mode="ar")
        random_texts = torch.randint(0, 40, (5, 20), generator=torch.Generator().manual_seed(table)).tolist()
        ngrams = count_ngrams([(text, 0) for text in (said.token_ids, *random_texts)], 40)
    model = tiny_model(seed, weight_scale=weight_scale, ngrams=ngrams)
    knobs = {"max_new_tokens": max_new_tokens, "logprobs": 2, **common}
    if budget is not None:
        knobs |= {"max_thinking_tokens": budget, "end_think_token_id": 7}
    expected = model.generate(prompt, mode="ar", **knobs)
    actual = model.generate(prompt, mode="self_spec", self_spec_kind="lookup", block_length=block_length, **knobs)
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reason == expected.finish_reason
    assert [told.token for told in actual.logprobs] == actual.token_ids
    assert [told.logprob for told in actual.logprobs] == pytest.approx(
        [told.logprob for told in expected.logprobs], abs=1e-4
    )


def test_the_chi_square_test_notices_a_sampler_that_accepts_every_draft():
    model = tiny_model(3, vocab_size=6, eos_token_ids=(), weight_scale=0.25, block_length=3)
    exact = enumerate_autoregression(model, [1, 4], 3, 1.0)
    outs = model.generate(
        [Request([1, 4], seed=s) for s in range(1000)],
        mode="diffusion",
        threshold=0.0,
        temperature=1.0,
        max_new_tokens=3,
        ignore_eos=True,
    )
    counts = Counter(tuple(out.token_ids) for out in outs)
    statistic, freedom = chi_square(counts, exact, 1000)
    assert statistic > freedom + 4.3 * math.sqrt(2 * freedom) + 10


def test_rejection_sampling_accepts_with_probability_p_over_q():
    model = tiny_model(0, vocab_size=5)
    answer = model.open_answer([1], {"mode": "self_spec", "temperature": 1.0, "seed": 0})
    g = answer.generation
    p = torch.tensor([0.5, 0.3, 0.2 - 1e-9, 1e-9, 1e-9])
    q = torch.tensor([0.1, 0.6, 0.3 - 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    firsts: Counter = Counter()
    num_accepted = 0
    total = 6000
    for _ in range(total):
        draft = int(torch.multinomial(q, 1, generator=g.random))
        tokens, _ = read(verify([draft], q[None], Rows(torch.stack([p.log(), p.log()])), g))
        firsts[tokens[0]] += 1
        num_accepted += len(tokens) == 2
    # sum of min(p, q) = 0.1 + 0.3 + 0.2; three standard deviations of 6,000 coin throws are 0.019
    assert abs(num_accepted / total - 0.6) < 0.02
    for token in range(3):
        assert abs(firsts[token] / total - float(p[token])) < 0.02


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 0.6},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.7},
        {"max_thinking_tokens": 2, "end_think_token_id": 7},
        {"max_thinking_tokens": 0, "end_think_token_id": 7},
        {"max_thinking_tokens": 2, "end_think_token_id": 7, "temperature": 0.0},
        {"constraint": OddBehindEven(), "logprobs": 2},
        {"constraint": OddBehindEven(), "temperature": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_q", [True, False], ids=["q", "certain"])
def test_places_that_are_looked_at_together_come_to_what_they_come_to_one_by_one(has_q, knobs):
    """Where logits lie on a device all places are judged before one is waited for: the same tokens, the same random numbers."""
    model = tiny_model(0, vocab_size=16)
    constraint = knobs.get("constraint")
    knobs = {name: value for name, value in knobs.items() if name != "constraint"}
    ends = Counter()
    for case in range(300):
        draws = torch.Generator().manual_seed(case)
        n = case % 7 + 1
        logits = 2 * torch.randn(n + 1, 16, generator=draws)
        # some drafts of the model's own likeliest, some of distributions that agree with it, to the last bit too
        near = logits[:n].clone() if case % 5 == 0 else logits[:n] + torch.randn(n, 16, generator=draws) * (case % 3)
        found = []
        for at_once in (False, True):
            settings = {"mode": "self_spec", "temperature": 1.0, "seed": case, **knobs}
            g = model.open_answer([1], settings).generation
            g.constraint = constraint
            q = None
            if has_q and g.settings.temperature > 0:
                q = truncated_distribution(adjusted(near, g), g.settings)
            drafts = adjusted(near, g).argmax(dim=-1).tolist() if q is None else pick(q, uniform(g, n)).tolist()
            if case % 2 and "end_think_token_id" in knobs:
                drafts[min(n - 1, case % 3)] = knobs["end_think_token_id"]
                q = None
            function = verify(drafts, q, Rows(logits), g, at_once=at_once)
            if at_once:
                wanted = next(function)
                with pytest.raises(StopIteration) as end:  # it reads once, whatever it reads
                    function.send([tensor.tolist() for tensor in wanted])
                (tokens, logprobs) = end.value.value
            else:
                tokens, logprobs = read(function)
            found.append((tokens, logprobs, float(uniform(g))))
            assert len(tokens) <= n + 1
            assert len(logprobs) == (len(tokens) if "logprobs" in knobs else 0)
        assert found[0] == found[1]
        ends[len(found[0][0]) == n + 1] += 1
    assert ends[False] > 20
    assert ends[True] > 20 or "end_think_token_id" in knobs or constraint is not None
