"""A trace tells of every forward what it did, in each mode, and agrees with the answer and with the counts."""

import io
import json

import pytest

from tests.worlds import MASK, random_lora, tiny_config, tiny_model
from trimode.decoding.trace import Trace
from trimode.engine.answer import Answer
from trimode.engine.engine import Engine, EngineLimits, Entry

PROMPT = [5, 9, 11, 7]
SHIFTED = {"known_tokens_are_causal": True, "block_predicts": "next", "adapter_acts_on": "masks"}
MODES = [
    {"mode": "ar"},
    {"mode": "diffusion"},
    {"mode": "diffusion", "threshold": 0.2, "editing_threshold": 0.2, "max_post_steps": 2},
    {"mode": "self_spec"},
    {"mode": "self_spec", "threshold": 0.3},
    {"mode": "self_spec", "self_spec_kind": "quadratic"},
    {"mode": "self_spec", "self_spec_kind": "lookup"},
]


def traced(model, prompt=PROMPT, **knobs):
    file = io.StringIO()
    output = model.generate(prompt, observe=Trace(file, lambda token: f"<{token}>"), seed=0, **knobs)
    return output, [json.loads(line) for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("facts", [{}, SHIFTED], ids=["own place", "next place"])
@pytest.mark.parametrize("knobs", MODES, ids=str)
@pytest.mark.parametrize("num", [1, 11])
def test_a_trace_adds_up_to_the_answer_and_its_counts(knobs, facts, num):
    if facts and knobs.get("self_spec_kind") == "quadratic":
        model = tiny_model(lora=random_lora(tiny_config(**facts)), **facts)
    else:
        model = tiny_model(**facts)
    output, records = traced(model, max_new_tokens=num, **knobs)
    committed = [place for record in records for place in record["committed"]]
    assert [token for _, token, _ in committed] == output.token_ids
    assert [place for place, _, _ in committed] == list(range(len(PROMPT), len(PROMPT) + len(output.token_ids)))
    assert all(p is not None and 0 <= p <= 1 for _, _, p in committed)
    stats = output.stats
    assert len(records) == stats.nfe_prefill + stats.nfe_decode
    assert sum(r["kind"] == "prefill" for r in records) == stats.nfe_prefill
    assert sum(r["revised"] for r in records) == stats.revised
    assert [r["step"] for r in records] == list(range(len(records)))
    assert [r["block"] for r in records] == sorted(r["block"] for r in records)
    assert records[-1]["canvas"] == []
    assert all(r["request"] == 0 and r["seconds"] > 0 for r in records)
    told = {int(token): text for record in records for token, text in record["texts"].items()}
    assert all(told[token] == f"<{token}>" for token in output.token_ids)
    assert MASK not in told


def test_probabilities_are_the_causal_models_own():
    model = tiny_model()
    for mode in ("ar", "self_spec"):
        output, records = traced(model, mode=mode, max_new_tokens=9)
        rows = model.logits([*PROMPT, *output.token_ids]).softmax(-1)
        for record in records:
            for place, token, probability in record["committed"]:
                assert probability == pytest.approx(float(rows[place - 1, token]), abs=1e-3)


def test_accepted_and_rejected_drafts_are_the_whole_draft():
    _, records = traced(tiny_model(), mode="self_spec", max_new_tokens=12)
    drafted = []
    for record in records[:-1]:
        if record["accepted"] is not None:
            confirmed = [place[:2] for place in record["committed"]][: record["accepted"]]
            assert confirmed + record["rejected"] == drafted
        drafted = record["canvas"]
    assert any(record["accepted"] is not None for record in records)


def test_requests_of_a_batch_and_of_an_engine_keep_their_numbers():
    model = tiny_model()
    file = io.StringIO()
    trace = Trace(file)
    many = model.generate([PROMPT, PROMPT[:2]], mode="self_spec", max_new_tokens=8, observe=trace)
    engine = Engine(model, EngineLimits(max_running=2, cache_positions=256), observe=trace)
    answers: list[Answer] = [
        model.open_answer(PROMPT, {"mode": mode, "max_new_tokens": 6}) for mode in ("ar", "diffusion")
    ]
    for answer in answers:
        engine.submit(Entry(answer, lambda event: None))
    engine.run_until_idle()
    records = [json.loads(line) for line in file.getvalue().splitlines()]
    told = [[p[1] for r in records if r["request"] == n for p in r["committed"]] for n in range(4)]
    wanted = [out.token_ids for out in many] + [a.generation.new_tokens for a in answers]
    assert sorted(told) == sorted(wanted)


def test_tracing_changes_nothing():
    model = tiny_model()
    for knobs in MODES:
        traced_ids = traced(model, max_new_tokens=9, temperature=0.8, **knobs)[0].token_ids
        assert traced_ids == model.generate(PROMPT, max_new_tokens=9, temperature=0.8, seed=0, **knobs).token_ids
