"""Law 5: the engine gives what the reference loop gives, whoever joins, leaves or is crowded out."""

import random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.laws.test_law_05_batch import KNOBS, REPEATING
from tests.worlds import AnyChoice, random_lora, tiny_config, tiny_model
from trimode.decoding.auto import Auto
from trimode.engine.engine import Engine, EngineLimits, Entry

MODELS = [
    tiny_model(1, lora=random_lora(tiny_config())),
    # as conversion makes them: the first place of a block is exact, the adapter acts on masks
    tiny_model(
        2,
        lora=random_lora(tiny_config()),
        block_predicts="next",
        known_tokens_are_causal=True,
        adapter_acts_on="masks",
    ),
    REPEATING,
]

arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # the tick at which it comes
        st.lists(st.integers(0, 39), min_size=1, max_size=40),
        st.integers(0, 30),  # leading tokens that it shares with the others
        st.sampled_from(KNOBS),
        st.integers(0, 1000),
        st.integers(1, 100),
        st.one_of(st.none(), st.none(), st.integers(0, 20)),  # ticks after which its client goes away
    ),
    min_size=2,
    max_size=8,
)
limits = st.builds(
    EngineLimits,
    max_running=st.integers(1, 5),
    # the smallest that holds any one of the requests; 1,024 crowds nobody out
    cache_positions=st.sampled_from([256, 1024]),
    prefill_inputs=st.integers(1, 12),
    prefill_inputs_alone=st.integers(1, 30),
)
SHARED = [7, 9, 4, 22, 31, 5, 5, 18, 36, 11] * 3


# no shrinking: a case takes a second, and a failing one would be shrunk for minutes
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.sampled_from(MODELS), arrivals, limits)
def test_the_engine_gives_what_the_reference_loop_gives(model, arrivals, limits):
    engine = Engine(model, limits)
    asked = []
    for tick, prompt, num_shared, knobs, seed, length, leaves in arrivals:
        prompt = [*SHARED[:num_shared], *prompt]
        knobs = {**knobs, "seed": seed, "max_new_tokens": length}
        asked.append((tick, prompt, knobs, leaves))
    events = [[] for _ in asked]
    entries = [
        Entry(model.open_answer(prompt, knobs), events[i].append, client=str(i % 2))
        for i, (_, prompt, knobs, _) in enumerate(asked)
    ]
    tick = 0
    while not engine.is_idle or tick <= 12:
        for entry, (arrival, _, _, leaves) in zip(entries, asked, strict=True):
            if arrival == tick:
                engine.submit(entry)
            if leaves is not None and arrival + leaves == tick:
                entry.cancelled = True
        engine.tick()
        tick += 1
        assert tick < 5000, "it never ends"
    for (_, prompt, knobs, leaves), heard in zip(asked, events, strict=True):
        alone = model.generate(prompt, **knobs)
        assert [e.kind for e in heard].count("finish") == 1
        out = heard[-1].output
        assert [t for e in heard for t in e.token_ids] == out.token_ids
        if out.finish_reason == "cancelled":
            assert leaves is not None
            assert out.token_ids == alone.token_ids[: len(out.token_ids)]
        else:
            assert out.token_ids == alone.token_ids
            assert out.finish_reason == alone.finish_reason
            assert out.stats.nfe_decode == alone.stats.nfe_decode
    _assert_nothing_leaked(engine)


def _assert_nothing_leaked(engine):
    stands = engine.snapshot()
    assert (stands.running, stands.waiting, stands.positions_running) == (0, 0, 0)
    while (extent := engine._prefixes.forget_oldest()) is not None:
        engine._extents.give_back(extent)
    assert engine._extents.num_free == stands.positions
    assert engine._extents.take(stands.positions) is not None, "the free extents did not join again"
    assert sorted(engine._slots) == list(range(engine.limits.max_running))


def run(engine, *requests):
    """Submit all at once; their outputs."""
    outputs = []
    for prompt, knobs in requests:
        engine.submit(Entry(engine.model.open_answer(prompt, knobs), lambda e: outputs.append((e.kind, e))))
    engine.run_until_idle()
    return [e.output for kind, e in outputs if kind == "finish"]


def test_requests_that_do_not_fit_together_make_room_and_lose_nothing():
    engine = Engine(MODELS[0], EngineLimits(cache_positions=512, max_running=4))
    knobs = {"mode": "ar", "max_new_tokens": 200, "ignore_eos": True}
    prompts = [[5, 6, i] for i in range(4)]
    outputs = run(engine, *((p, knobs) for p in prompts))
    assert engine.snapshot().preemptions > 0
    expected = sorted(MODELS[0].generate(p, **knobs).token_ids for p in prompts)
    assert sorted(o.token_ids for o in outputs) == expected


def test_a_prefix_that_was_read_once_is_not_read_again():
    engine = Engine(MODELS[0])
    prompt = [5 + i % 30 for i in range(200)]
    knobs = {"mode": "ar", "max_new_tokens": 5}
    (first,) = run(engine, (prompt, knobs))
    (again,) = run(engine, (prompt, knobs))
    assert engine.snapshot().reused_tokens == 199
    assert again.token_ids == first.token_ids
    run(engine, ([*prompt[:100], 1, 2], knobs))
    assert engine.snapshot().reused_tokens == 299


def test_a_long_prompt_is_read_in_pieces_while_others_decode():
    engine = Engine(MODELS[0], EngineLimits(prefill_inputs=10))
    sizes = []
    whole = engine._run

    def watched(generations, steps):
        sizes.append(sum(len(s.tokens) for s in steps))
        return whole(generations, steps)

    engine._run = watched
    told = []
    for i in range(3):
        answer = engine.model.open_answer([5, i], {"mode": "ar", "max_new_tokens": 60, "ignore_eos": True})
        engine.submit(Entry(answer, told.append))
    engine.tick()
    late = Entry(engine.model.open_answer([7] * 300, {"mode": "ar", "max_new_tokens": 2}), told.append)
    engine.submit(late)
    for _ in range(20):
        engine.tick()
    assert max(sizes[1:]) <= 13
    assert late.generation.cached > 150


def test_clients_take_turns_in_the_queue():
    engine = Engine(MODELS[0], EngineLimits(max_running=1))
    order = []
    for client in "aaab":
        answer = engine.model.open_answer([5], {"mode": "ar", "max_new_tokens": 2})
        entry = Entry(answer, lambda e, c=client: order.append(c) if e.kind == "finish" else None, client=client)
        engine.submit(entry)
    engine.run_until_idle()
    assert order == ["a", "b", "a", "a"]


def test_a_failing_forward_ends_its_requests_and_the_engine_goes_on(caplog):
    engine = Engine(MODELS[0])
    whole = engine._run

    def broken(generations, steps):
        raise RuntimeError("out of luck")

    engine._run = broken
    (out,) = run(engine, ([5], {"mode": "ar"}))
    assert out.finish_reason == "error"
    assert "out of luck" in caplog.text
    engine._run = whole
    (out,) = run(engine, ([5], {"mode": "ar"}))
    assert out.finish_reason in ("stop", "length")
    _assert_nothing_leaked(engine)


def test_a_prompt_that_is_read_in_pieces_leaves_a_token_for_those_who_revise():
    knobs = {"mode": "diffusion", "temperature": 0.7, "editing_threshold": 0.2, "max_post_steps": 2}
    converted = MODELS[1]
    for seed in range(60, 80):
        engine = Engine(converted, EngineLimits(prefill_inputs=1, prefill_inputs_alone=5))
        asked = {**knobs, "seed": seed, "max_new_tokens": 13}
        entry = Entry(converted.open_answer([*SHARED[:12], 31, 1, 25, 26, 9], asked), lambda event: None)
        engine.submit(entry)
        while not engine.is_idle:
            engine.tick()
        assert entry.generation.new_tokens == converted.generate(list(entry.generation.prompt), **asked).token_ids


def test_whatever_auto_chooses_and_whoever_is_crowded_out_answers_are_those_of_ar():
    num_crowded_out = num_looked_up = 0
    for seed in range(6):
        some = random.Random(seed)
        engine = Engine(REPEATING, EngineLimits(max_running=4, cache_positions=256, prefill_inputs=some.randint(1, 9)))
        entries = []
        for _ in range(6):
            prompt = [*SHARED[: some.choice([0, 20])], *(some.randrange(4, 9) for _ in range(some.randint(1, 11)))]
            knobs = {"mode": "self_spec", "max_new_tokens": some.randint(40, 100), "ignore_eos": True}
            answer = REPEATING.open_answer(prompt, knobs)
            answer.generation.decoder = Auto(AnyChoice(some.random()))
            entries.append(Entry(answer, lambda event: None))
            engine.submit(entries[-1])
        for _ in range(3000):
            if engine.is_idle:
                break
            engine.tick()
        for entry in entries:
            g = entry.generation
            ar = REPEATING.generate(
                list(g.prompt), mode="ar", max_new_tokens=g.settings.max_new_tokens, ignore_eos=True
            )
            assert g.new_tokens == ar.token_ids
            num_looked_up += sum(count for name, count in g.choices.items() if name.startswith("lookup"))
        num_crowded_out += engine.snapshot().preemptions
    assert num_crowded_out > 0
    assert num_looked_up > 50
