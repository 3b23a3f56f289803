"""What is captured when, and what a greedy step costs in waiting: the logic of `model.graphs`, rehearsed on the CPU."""

import gc
import threading
from dataclasses import replace

import pytest
import torch

from tests.model.test_static import filled, forward, inputs_of
from tests.worlds import random_lora, tiny_config
from trimode.decoding.interface import Rows
from trimode.engine.engine import Engine, EngineLimits, Entry
from trimode.engine.language_model import LanguageModel
from trimode.model.forward import TorchScores
from trimode.model.graphs import KernelChoice, Rehearsal, StaticForward
from trimode.model.lora import ADAPTED_PARTS
from trimode.model.static import StaticShape
from trimode.model.views import Bidirectional, BlockOverCausal, Causal


def static_of(engine, cache) -> StaticForward:
    return engine._static_of[cache]


def step(engine, cache, *rows, **options):
    inputs = inputs_of(rows, **options)
    return engine(inputs, cache).answers(0, len(inputs.asked))


def test_the_second_step_of_a_bucket_is_captured_and_later_ones_replay():
    engine = forward()
    cache = engine.make_cache([400])
    for cached, expected in ((3, 0), (4, 1), (5, 1), (6, 1)):
        step(engine, cache, (cached, 1, Causal()))
        assert engine.capture.num_captures == expected
    # more keys: another bucket
    for cached, expected in ((300, 1), (301, 2), (302, 2)):
        step(engine, cache, (cached, 1, Causal()))
        assert engine.capture.num_captures == expected


def test_one_graph_serves_all_views_and_cursors_of_a_bucket():
    engine = forward()
    cache = engine.make_cache([100, 100])
    for cached, view in ((3, Causal()), (50, Bidirectional()), (7, BlockOverCausal(2)), (0, Causal())):
        inputs = inputs_of([(cached, 7, view), (cached + 1, 8, Causal())])
        filled_cache = filled(forward(captured=False), [(cached, 7, view), (cached + 1, 8, Causal())], slack=40)
        expected = forward(captured=False)(inputs, filled_cache).answers(0, 15)
        for own, theirs in zip(
            (*cache.memory.keys, *cache.memory.values),
            (*filled_cache.memory.keys, *filled_cache.memory.values),
            strict=True,
        ):
            for slot in (0, 1):
                start = filled_cache.starts[slot]
                own[100 * slot : 100 * slot + cached + slot] = theirs[start : start + cached + slot]
        torch.testing.assert_close(engine(inputs, cache).answers(0, 15).logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert engine.capture.num_captures == 1


def test_a_bounded_number_of_graphs_is_kept_and_the_least_used_go_first():
    engine = forward()
    cache = engine.make_cache([2000])
    static = static_of(engine, cache)
    static.graphs._most = 2
    for length in (1, 2, 4, 1, 2, 4):
        step(engine, cache, (0, length, Causal()))
    assert engine.capture.num_captures == 3
    assert len(static.graphs) == 2
    assert {shape.length for shape in static.graphs._replays} == {2, 4}
    step(engine, cache, (0, 2, Causal()))
    assert engine.capture.num_captures == 3
    step(engine, cache, (0, 1, Causal()))
    assert {shape.length for shape in static.graphs._replays} == {1, 2}


def test_a_device_that_refuses_to_capture_still_answers():
    class Refusing(Rehearsal):
        def capture(self, function, static):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = forward()
    engine.capture = Refusing()
    cache = engine.make_cache([100])
    found = [step(engine, cache, (3, 2, Causal())).unread_best for _ in range(4)]
    assert all(torch.equal(one, found[0]) for one in found)
    assert static_of(engine, cache).graphs.refusal == "operation not permitted when stream is capturing"


def test_memory_and_its_graphs_go_from_one_request_to_the_next():
    engine = forward()
    for _ in range(3):
        cache = engine.make_cache([60])
        memory = cache.memory
        step(engine, cache, (0, 1, Causal()))
        del cache
        gc.collect()
    assert engine.capture.num_captures == 1
    assert engine.make_cache([60]).memory is memory
    gc.collect()
    wider = engine.make_cache([memory.num_positions + 1])
    assert wider.memory is not memory


def test_two_caches_at_a_time_never_share_memory_and_a_new_request_finds_it_clean():
    engine = forward()
    one, other = engine.make_cache([60]), engine.make_cache([60])
    assert one.memory is not other.memory
    one.memory.keys[0].fill_(float("nan"))
    memory = one.memory
    scores = engine(inputs_of([(0, 3, Causal())]), other)
    del one, other
    gc.collect()
    again = engine.make_cache([60])
    assert again.memory is memory
    assert all(bool((tensor == 0).all()) for tensor in (*memory.keys, *memory.values))
    # whose logits somebody may still read is not lent
    assert engine.make_cache([60]).memory is not scores._cache.memory


def test_logits_stay_while_others_run_in_other_threads():
    engine = forward()
    first = engine(inputs_of([(0, 3, Causal())]), engine.make_cache([60]))
    expected = first.logits(0, 3).clone()
    threads = [
        threading.Thread(target=lambda: engine(inputs_of([(0, 3, Causal())], seed=5), engine.make_cache([60])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(first.logits(0, 3), expected)


# ---- which kernel -----------------------------------------------------------------------------------------------------------

SHAPE = StaticShape(num_rows=1, length=4, num_keys=256, num_asked=1, sight="causal")


def test_the_fastest_kernel_is_measured_once_a_width_and_remembered():
    asked = []

    def seconds(shape):
        asked.append(shape.kernel)
        return {"sdpa": 2.0, "flash": 1.0, "plain": 3.0}[shape.kernel]

    choice = KernelChoice(None, ("sdpa", "flash", "plain"))
    assert choice(SHAPE, seconds).kernel == "sdpa"
    assert not asked
    for _ in range(3):
        chosen = choice(SHAPE, seconds)
        assert (chosen.kernel, chosen.sight) == ("flash", "causal")
    assert asked == ["sdpa", "flash", "plain"]


def test_flash_attention_is_no_choice_for_a_view_that_it_does_not_know_and_a_kernel_that_fails_is_none():
    def seconds(shape):
        if shape.kernel == "flash":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        return 1.0

    choice = KernelChoice(None)
    for shape in (SHAPE, replace(SHAPE, sight="any")):
        for _ in range(2):
            chosen = choice(shape, seconds)
            assert (chosen.kernel, chosen.sight) == ("sdpa", "any")
    assert KernelChoice("flash")(replace(SHAPE, sight="any"), seconds).kernel == "sdpa"


def test_measuring_a_kernel_leaves_the_step_as_it_is():
    choice = KernelChoice(None, ("sdpa", "plain"))
    engine, other = forward(choice=choice), forward()
    caches = [e.make_cache([100]) for e in (engine, other)]
    for cached in range(4):
        found, expected = (
            step(e, c, (cached, 1, Causal()), seed=cached) for e, c in zip((engine, other), caches, strict=True)
        )
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert len(choice.chosen) == 1


# ---- whole answers ----------------------------------------------------------------------------------------------------------

MODES = [
    {"mode": "ar"},
    {"mode": "diffusion"},
    {"mode": "diffusion", "editing_threshold": 0.5, "max_post_steps": 2},
    {"mode": "self_spec"},
    {"mode": "self_spec", "threshold": 0.7},
    {"mode": "self_spec", "self_spec_kind": "quadratic"},
]
CHECKPOINTS = {
    "reference": {},
    "masks": {"known_tokens_are_causal": True, "adapter_acts_on": "masks"},
    "shifted": {"known_tokens_are_causal": True, "adapter_acts_on": "masks", "block_predicts": "next"},
}


def model(*, captured, successor=0, **changes):
    config = tiny_config(**changes)
    parts = ADAPTED_PARTS if config.adapter_acts_on == "masks" else ("output",)
    lora = random_lora(config, parts, successor=successor)
    engine = forward(config=config, lora=lora, captured=captured)
    return LanguageModel("tiny", engine, adapter=lora)


@pytest.mark.parametrize("changes", CHECKPOINTS)
@pytest.mark.parametrize("knobs", MODES, ids=lambda k: "-".join(map(str, k.values())))
def test_answers_are_the_same_and_no_greedy_decoder_looks_at_logits(knobs, changes, monkeypatch):
    if knobs.get("self_spec_kind") == "quadratic" and changes == "reference":
        knobs = {**knobs, "draft_lora": False}
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]
    expected = model(captured=False, **CHECKPOINTS[changes]).generate(prompts, max_new_tokens=40, **knobs)
    own = model(captured=True, **CHECKPOINTS[changes])
    # what they want to know was found beside
    if "editing_threshold" not in knobs:
        spoil_logits(monkeypatch)
    outs = own.generate(prompts, max_new_tokens=40, **knobs)
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
    assert [out.stats.nfe_decode for out in outs] == [out.stats.nfe_decode for out in expected]
    assert own.forward.capture.num_captures > 0


@pytest.mark.parametrize("knobs", MODES, ids=lambda k: "-".join(map(str, k.values())))
def test_drafts_that_know_the_draft_before_them_are_the_same_through_graphs(knobs):
    """They come from hidden states that lie in a graph's memory."""
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]
    expected, outs = (
        model(captured=captured, successor=5, **CHECKPOINTS["shifted"]).generate(prompts, max_new_tokens=40, **knobs)
        for captured in (False, True)
    )
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
    assert [out.stats.nfe_decode for out in outs] == [out.stats.nfe_decode for out in expected]


def spoil_logits(monkeypatch):
    """Let the logits of answers be no numbers."""
    whole = TorchScores.answers

    def without(self, start, stop):
        found = whole(self, start, stop)
        return found._replace(logits=torch.full_like(found.logits, float("nan")))

    monkeypatch.setattr(TorchScores, "answers", without)


def test_spoilt_logits_make_other_answers_of_whoever_looks_at_them(monkeypatch):
    """Else the test above would say nothing."""
    given = {"mode": "ar", "max_new_tokens": 8, "logit_bias": {3: 0.1}}
    expected = model(captured=True).generate([5, 6, 7], **given).token_ids
    spoil_logits(monkeypatch)
    assert model(captured=True).generate([5, 6, 7], **given).token_ids != expected


@pytest.mark.parametrize("changes", CHECKPOINTS)
def test_an_engine_of_mixed_requests_gives_through_graphs_what_each_gives_alone_without(changes):
    """Slots anywhere, prompts in pieces, all views in one forward."""
    own, ordinary = (model(captured=captured, **CHECKPOINTS[changes]) for captured in (True, False))
    limits = EngineLimits(max_running=4, cache_positions=256, prefill_inputs=7, prefill_inputs_alone=16)
    engine = Engine(own, limits)
    asked = [([5 + i] * (3 + 9 * i), {**MODES[i % 5], "max_new_tokens": 20 + 7 * i}) for i in range(7)]
    entries = [Entry(own.open_answer(prompt, knobs), lambda event: None) for prompt, knobs in asked]
    for entry in entries:
        engine.submit(entry)
    engine.run_until_idle()
    for entry, (prompt, knobs) in zip(entries, asked, strict=True):
        assert entry.generation.new_tokens == ordinary.generate(prompt, **knobs).token_ids
    assert own.forward.capture.num_captures > 3


@pytest.mark.parametrize("changes", CHECKPOINTS)
def test_sampled_answers_of_a_seed_are_the_same_through_graphs(changes):
    knobs = {"mode": "self_spec", "temperature": 0.8, "seed": 3, "max_new_tokens": 30}
    outs = [model(captured=c, **CHECKPOINTS[changes]).generate([5, 6, 7], **knobs) for c in (False, True)]
    assert outs[0].token_ids == outs[1].token_ids


def test_scores_and_logits_are_the_same_through_graphs():
    ordinary, captured = model(captured=False), model(captured=True)
    ids = list(range(4, 40))
    assert captured.score(ids) == pytest.approx(ordinary.score(ids), abs=1e-3)
    torch.testing.assert_close(
        captured.logits(ids, view="block", prefix=20, draft_lora=True),
        ordinary.logits(ids, view="block", prefix=20, draft_lora=True),
        atol=2e-5,
        rtol=2e-5,
    )


def test_the_cost_table_tells_captured_forwards_from_others():
    assert forward().describe() != forward(captured=False).describe()


def test_a_run_of_rows_is_a_view_for_indices_would_be_sent_to_the_device():
    logits = torch.randn(5, 7)
    rows = Rows(logits, (1, 2, 3, 4, 5), torch.arange(5.0), torch.arange(5), torch.arange(5.0) - 1)
    for which in ([1, 2, 3], [0], [], [0, 1, 2, 3, 4]):
        assert rows[which].logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    for which in ([0, 2], [3, 1], [2, 2], [1, 2, 4]):
        assert torch.equal(rows[which].logits, logits[which])
        assert rows[which].best == tuple(rows.best[i] for i in which)
        assert torch.equal(rows[which].best_logits, rows.best_logits[which])
        assert torch.equal(rows[which].unread_best, rows.unread_best[which])
        assert torch.equal(rows.picked(torch.tensor(which)).logits, logits[which])


def test_probabilities_of_the_best_tokens_need_no_logits_and_are_those_of_the_softmax():
    logits = torch.randn(4, 7, dtype=torch.float32)
    best = logits.argmax(dim=-1)
    top, total = logits.amax(dim=-1), logits.logsumexp(dim=-1)
    expected = logits.softmax(dim=-1)
    unread = Rows(torch.full_like(logits, float("nan")), None, total, best, top)
    torch.testing.assert_close(unread.best_probabilities(), expected.amax(dim=-1))
    for rows in (Rows(logits, tuple(best.tolist())), Rows(logits, tuple(best.tolist()), total)):
        torch.testing.assert_close(rows.best_probabilities(), expected.amax(dim=-1))
        others = (best + 1) % 7
        given = rows.probabilities(others.tolist())
        torch.testing.assert_close(given, expected.gather(-1, others[:, None])[:, 0])
