"""`auto`: the choice follows the curve of costs, and no choice changes an answer."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import AnyChoice, random_lora, tiny_model
from trimode.decoding.auto import Auto
from trimode.decoding.interface import Choice
from trimode.decoding.lookup import GOES_ON, LIKELY, Suggestion
from trimode.engine import cost
from trimode.engine.cost import (
    ENOUGH,
    REPEATS,
    Acceptance,
    CostTable,
    LatelySeen,
    MeasuredChooser,
    Trust,
    cost_table,
    kept_table,
    measure_cost,
)

FLAT = CostTable(num_inputs=(1, 64, 128), causal_s=(1.0, 1.05, 1.1), drafting_s=(1.0, 1.05, 1.1))
STEEP = CostTable(num_inputs=(1, 2, 128), causal_s=(1.0, 2.0, 128.0), drafting_s=(1.0, 2.0, 128.0))
BENT = CostTable(num_inputs=(1, 8, 128), causal_s=(1.0, 1.1, 16.0), drafting_s=(1.0, 1.1, 16.0))


ASKED = tiny_model(3)


def not_looked_up(g, most):
    raise AssertionError("a match is looked for")


def nothing(g, most):
    """No text suggests anything."""


def worlds():
    adapted = {"adapter_acts_on": "masks", "known_tokens_are_causal": True}
    yield tiny_model(3)
    yield tiny_model(4, block_predicts="next")
    yield tiny_model(5, lora=random_lora(tiny_model(5).config), block_predicts="next", **adapted)


@pytest.mark.parametrize("model", list(worlds()), ids=["self", "next", "converted"])
@given(seed=st.integers(0, 10_000), prompts=st.lists(st.lists(st.integers(4, 39), min_size=1, max_size=9), max_size=3))
@settings(max_examples=15, deadline=None)
def test_whatever_is_chosen_a_greedy_answer_is_that_of_ar(model, seed, prompts):
    prompts = [[5, 6], *prompts]
    expected = [out.token_ids for out in model.generate(prompts, mode="ar", max_new_tokens=24)]
    auto = Auto(AnyChoice(seed))
    answers = [model.open_answer(p, {"mode": "self_spec", "max_new_tokens": 24}) for p in prompts]
    for answer in answers:
        answer.generation.decoder = auto
    for _ in model._run(answers, None):
        pass
    assert [a.generation.new_tokens for a in answers] == expected
    assert all(sum(a.generation.choices.values()) >= 1 for a in answers)


def chosen(table, rate, num_sharing=1, first_is_exact=False):
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=first_is_exact)
    return chooser._best(Acceptance(rate), None, num_sharing, 0)[0]


def test_where_width_costs_nothing_good_drafts_are_verified_and_drafted_in_one_forward():
    assert chosen(FLAT, 0.8).kind == "quadratic"


def test_where_every_input_costs_as_much_as_a_forward_nothing_is_drafted():
    assert chosen(STEEP, 0.95) == Choice("ar")


def test_where_drafts_are_never_right_nothing_is_drafted():
    assert chosen(FLAT, 0.0) == Choice("ar")


def test_a_block_ends_where_the_curve_bends():
    choice = chosen(BENT, 0.9)
    assert choice.kind == "linear"
    assert 6 <= choice.block_length <= 10


def test_many_that_share_a_forward_draft_less():
    lengths = [chosen(BENT, 0.9, n).block_length for n in (1, 2, 4, 16)]
    assert lengths == sorted(lengths, reverse=True)
    assert chosen(BENT, 0.9, 64) == Choice("ar")


@given(
    rate=st.floats(0, 1),
    seconds=st.lists(st.floats(0.001, 1), min_size=3, max_size=3),
    num_sharing=st.integers(1, 32),
    exact=st.booleans(),
)
def test_the_choice_promises_at_least_what_ar_does(rate, seconds, num_sharing, exact):
    rising = tuple(sorted(seconds))
    table = CostTable(num_inputs=(1, 8, 64), causal_s=rising, drafting_s=rising)
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=exact)
    speeds = chooser.speeds(Acceptance(rate), None, num_sharing)
    choice, promised = chooser._best(Acceptance(rate), None, num_sharing, 0)
    assert promised == speeds[choice] >= speeds[Choice("ar")]


@given(
    seconds=st.lists(st.floats(0.001, 1), min_size=3, max_size=3), num_sharing=st.integers(1, 32), exact=st.booleans()
)
def test_where_not_even_drafts_that_are_all_right_pay_nothing_is_weighed(seconds, num_sharing, exact):
    rising = tuple(sorted(seconds))
    table = CostTable(num_inputs=(1, 8, 64), causal_s=rising, drafting_s=rising)
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=exact)
    choice, _ = chooser._best(Acceptance(1.0), None, num_sharing, 0)
    g = ASKED.open_answer([5], {"mode": "self_spec"}).generation
    request = chooser._of(g)
    quoted = chooser._best_quote(request, Suggestion((9,) * 15, (1.0,) * 15, 4), num_sharing, 0)[1]
    if chooser._is_crowd(num_sharing):
        assert choice == Choice("ar")
        assert quoted <= ENOUGH / table.seconds(False, num_sharing) + 1e-9
        assert chooser.choose(g, num_sharing, not_looked_up) == Choice("ar")


def test_a_crowd_on_a_steep_curve_and_none_on_a_flat_one():
    crowds = [MeasuredChooser(t, has_adapter=True, first_is_exact=True)._is_crowd(8) for t in (STEEP, FLAT)]
    assert crowds == [True, False]


def settled(table, rate, seen):
    """What is chosen once forwards, by width and whether they draft, take what `seen` says and not what the table does."""
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=False)
    assert chooser.costs.table is table
    for (drafting, num_inputs), seconds in seen.items():
        for _ in range(200):
            chooser.note_cost(drafting, num_inputs, 0, seconds)
    return chooser._best(Acceptance(rate), None, 1, 0)[0]


def test_where_forwards_take_longer_than_the_table_says_the_choice_follows_them():
    assert settled(FLAT, 0.6, {}).kind == "quadratic"
    wide = {(True, n): float(n) for n in range(2, 97)} | {(False, n): float(n) for n in range(1, 97)}
    assert settled(FLAT, 0.6, wide) == Choice("ar")
    assert settled(STEEP, 0.9, {(d, n): 1.0 for d in (True, False) for n in range(1, 97)}).kind == "quadratic"


def test_a_table_that_was_measured_on_a_busy_machine_is_off_as_a_whole():
    busy = CostTable(num_inputs=(1, 8, 128), causal_s=(10.0, 11.0, 160.0), drafting_s=(10.0, 11.0, 160.0))
    assert settled(busy, 0.9, {(False, 1): 1.0}) == settled(BENT, 0.9, {})


def test_one_forward_that_was_interrupted_changes_little_and_a_slower_machine_is_noticed():
    costs = LatelySeen(BENT)
    for _ in range(50):
        costs.note(False, 1, 0, 1.0)
    version = costs.version
    costs.note(False, 1, 0, 1000.0)
    assert costs.seconds(False, 1) < 1.1
    for _ in range(100):
        costs.note(False, 1, 0, 1.5)
    assert costs.seconds(False, 1) == pytest.approx(1.5, rel=0.05)
    assert costs.version > version


def test_forwards_of_others_and_prompts_are_no_measure_and_all_others_are(monkeypatch):
    monkeypatch.setattr("trimode.decoding.auto.SEEN_EVERY", 1)
    model = tiny_model(3)
    noted = []

    class Noting(AnyChoice):
        def choose(self, g, num_sharing, suggest):
            return Choice("ar")

        def note_cost(self, drafting, num_inputs, context, seconds):
            noted.append((drafting, num_inputs))

    auto = Auto(Noting(0))

    def run(*modes):
        noted.clear()
        answers = [model.open_answer([5, 6, 7], {"mode": mode, "max_new_tokens": 6}) for mode in modes]
        answers[0].generation.decoder = auto
        for _ in model._run(answers, None):
            pass
        return noted, answers[0].generation.num_new

    alone, num_new = run("self_spec")
    assert alone == [(False, 1)] * (num_new - 1)
    monkeypatch.setattr("trimode.decoding.auto.SEEN_EVERY", 4)
    assert len(run("self_spec")[0]) <= (num_new + 3) // 4  # what is done most need not be told each time
    monkeypatch.setattr("trimode.decoding.auto.SEEN_EVERY", 1)
    shared, _ = run("self_spec", "diffusion")
    assert all(num_inputs == 1 for _, num_inputs in shared)
    assert len(shared) < num_new - 1


def test_acceptance_is_learnt_by_place_and_what_is_older_fades():
    known = Acceptance(prior=0.5)
    for _ in range(400):
        known.note(4, 2)
    assert known.rate(0) > 0.95
    assert known.rate(1) > 0.95
    assert known.rate(2) < 0.1
    assert known.rate(7) <= known.rate(3)  # never tried: not better than the last that was
    for _ in range(400):
        known.note(4, 0)
    assert known.rate(0) < 0.1


def test_a_request_that_turns_out_unlike_the_others_is_treated_by_its_own_count():
    model = tiny_model(3)
    chooser = MeasuredChooser(BENT, has_adapter=True, first_is_exact=False)
    good, bad = (model.open_answer([5], {"mode": "self_spec"}).generation for _ in range(2))
    for _ in range(100):
        chooser.note(good, 7, 6)
        chooser.note(bad, 7, 0)
    assert chooser.choose(good, 2, nothing).kind != "ar"
    assert chooser.choose(bad, 2, nothing).kind == "ar"


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_what_is_nearly_as_good_is_tried_ever_more_rarely_and_what_is_hopeless_never_again(rate):
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    table = CostTable(num_inputs=(1, 8, 128), causal_s=(1.0, 1.8, 28.0), drafting_s=(1.0, 1.8, 28.0))
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=False)
    # each draft with a chance of a half makes about 0.95 of ar's speed at best
    accepted = itertools.cycle([0, 1, 0, 2, 0, 1, 0, 3] if rate else [0])
    for _ in range(100):
        chooser.note(g, 7, next(accepted))
    drafted = []
    for i in range(10 * cost.PROBE_EVERY):
        choice = chooser.choose(g, 1, nothing)
        if choice.kind != "ar":
            drafted.append(i)
            chooser.note(g, choice.block_length - 1, min(choice.block_length - 1, next(accepted)))
    waits = [b - a - 1 for a, b in itertools.pairwise(drafted)]
    if rate:
        assert drafted[0] == cost.FIRST_PROBE
        assert waits[:3] == [2 * cost.FIRST_PROBE, 4 * cost.FIRST_PROBE, 8 * cost.FIRST_PROBE]
        assert set(waits[4:]) == {cost.PROBE_EVERY}
    else:
        assert drafted == []


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_a_trial_lasts_until_a_draft_is_verified(kind, monkeypatch):
    """A quadratic round only drafts in its first forward."""
    model = tiny_model(3)
    chooser = MeasuredChooser(FLAT, has_adapter=True, first_is_exact=False)
    # drafting promises less than ar, and enough to be tried
    monkeypatch.setattr(
        chooser, "_best", lambda *a: (Choice(kind, 3) if len(a) == 5 and a[-1] == cost.NEARLY else Choice("ar"), 1e9)
    )
    verified = []
    monkeypatch.setattr(
        chooser, "note", lambda g, *a: verified.append(g.num_new) or MeasuredChooser.note(chooser, g, *a)
    )
    answer = model.open_answer([5], {"mode": "self_spec", "max_new_tokens": 60, "ignore_eos": True})
    answer.generation.decoder = Auto(chooser)
    for _ in model._run([answer], None):
        pass
    rounds = answer.generation.choices[f"{kind} 3"]
    assert len(verified) >= 3
    assert rounds == len(verified) * (2 if kind == "quadratic" else 1)


def test_who_drafts_sees_what_ar_costs_once_in_a_while():
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    chooser = MeasuredChooser(BENT, has_adapter=True, first_is_exact=False)
    for _ in range(100):
        chooser.note(g, 7, 7)
    kinds = [chooser.choose(g, 1, nothing).kind for _ in range(3 * cost.PROBE_EVERY)]
    assert 2 <= kinds.count("ar") <= 4
    assert kinds.index("ar") >= cost.PROBE_EVERY


def test_behind_a_long_context_a_block_costs_more():
    table = CostTable(num_inputs=(1, 8, 128), causal_s=(1.0, 1.1, 16.0), drafting_s=(1.0, 1.1, 16.0), position_s=0.001)
    chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=False)
    lengths = [chooser._best(Acceptance(0.9), None, 1, context)[0].block_length for context in (0, 1000, 100_000)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 1


def test_a_seeded_sample_hangs_neither_on_who_shares_the_forward_nor_on_a_clock():
    g = tiny_model(3).open_answer([5], {"mode": "self_spec", "temperature": 1.0, "seed": 1}).generation
    for table in (FLAT, BENT, STEEP):
        chooser = MeasuredChooser(table, has_adapter=True, first_is_exact=False)
        for num_sharing in (1, 30):
            assert chooser.choose(g, num_sharing, nothing) == Choice("ar")
            chooser.note(g, 4, 4)


def test_a_first_token_does_not_wait_for_the_measuring():
    measured = []

    def measure():
        measured.append(True)
        return BENT

    model = tiny_model(3)
    answer = model.open_answer([5], {"mode": "self_spec", "max_new_tokens": 3})
    answer.generation.decoder = Auto(MeasuredChooser(measure, has_adapter=True, first_is_exact=False))
    ticks = model._run([answer], None)
    next(ticks)
    assert answer.generation.num_new >= 1
    assert measured == []
    for _ in ticks:
        pass
    assert measured == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"drafting_s": [1.0, 2.0]},
        {"causal_s": [float("nan")] * 8},
        {"causal_s": [-1.0] * 8},
        {"num_inputs": [1, 2, 4, 8, 16, 32, 128, 64]},
        {"num_inputs": [], "causal_s": [], "drafting_s": []},
        {"position_s": "much"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_kept_table_that_cannot_be_one_is_measured_again(changes, tmp_path):
    model = tiny_model(3)
    cost_table(model.forward, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    kept["table"].update(changes)
    file.write_text(json.dumps(kept))
    assert kept_table(model.forward, folder=tmp_path) is None
    assert cost_table(model.forward, folder=tmp_path).is_sound
    assert kept_table(model.forward, folder=tmp_path) is not None


def test_the_table_is_measured_once_and_kept_for_this_machine_alone(tmp_path):
    model = tiny_model(3)
    table = cost_table(model.forward, folder=tmp_path)
    assert table.num_inputs[0] == 1
    assert list(table.causal_s) == sorted(table.causal_s)
    assert all(s > 0 for s in table.causal_s)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    kept["table"]["causal_s"][0] = 123.0
    file.write_text(json.dumps(kept))
    assert cost_table(model.forward, folder=tmp_path).causal_s[0] == 123.0
    kept["identity"]["processor"] = "another machine"
    file.write_text(json.dumps(kept))
    assert cost_table(model.forward, folder=tmp_path).causal_s[0] != 123.0
    file.write_text("{")
    assert cost_table(model.forward, folder=tmp_path).causal_s[0] != 123.0


def test_a_home_that_cannot_be_written_costs_only_the_keeping(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cost_table(tiny_model(3).forward, folder=blocked / "below").num_inputs


class Counted:
    """A forward that counts its runs."""

    def __init__(self, forward):
        self.config, self.make_cache, self.forward = forward.config, forward.make_cache, forward
        self.num = 0

    def __call__(self, inputs, cache):
        self.num += 1
        return self.forward(inputs, cache)


def test_measuring_stays_within_its_budget():
    table = measure_cost(Counted(tiny_model(3).forward), budget_s=0.0)
    assert table.num_inputs == (1,)
    assert table.seconds(False, 8) == pytest.approx(8 * table.causal_s[0])


@pytest.mark.parametrize(("size_s", "times"), [(0.0, 3), (1e9, 7)])
def test_forwards_that_take_long_are_measured_fewer_times(monkeypatch, size_s, times):
    monkeypatch.setattr(cost, "SIZE_S", size_s)
    counted = Counted(tiny_model(3).forward)
    table = measure_cost(counted)
    kinds = 1 if counted.config.mask_token_id is None else 2
    position = 1 + 2 * REPEATS.start
    assert counted.num == 1 + times * kinds * len(table.num_inputs) + position


def suggestion(length):
    return Suggestion((9,) * 15, (LIKELY[length], *[GOES_ON] * 14), length)


MATCH = suggestion(3)


def rounds(chooser, g, num, accept, match=MATCH):
    """Choices of so many rounds in which the text always suggests something; accept: of how many drafts how many."""
    choices = []
    for _ in range(num):
        g.choice = chooser.choose(g, 1, lambda g, most: match)
        choices.append(g.choice)
        if g.choice.kind != "ar":
            drafted = g.choice.block_length - 1
            chooser.note(g, drafted, min(drafted, accept) if g.choice.kind == "lookup" else 0)
    return choices


def test_what_the_text_suggests_is_verified_while_it_is_right_and_forwards_are_cheap():
    rising = CostTable(num_inputs=(1, 8, 128), causal_s=(1.0, 1.8, 60.0), drafting_s=(1.0, 1.8, 60.0))
    chooser = MeasuredChooser(rising, has_adapter=True, first_is_exact=False)
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    right = rounds(chooser, g, 60, accept=99)
    assert {choice.kind for choice in right[-10:]} == {"lookup"}
    assert 6 <= right[-1].block_length <= 10  # where the curve bends
    wrong = rounds(chooser, g, 200, accept=0)
    assert {choice.kind for choice in wrong[-50:]} == {"ar"}
    # matches of another length are another matter, and another text is given its chance
    assert rounds(chooser, g, 1, accept=0, match=suggestion(2))[0].block_length > 2
    other = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    assert {choice.kind for choice in rounds(chooser, other, 40, accept=99)[-10:]} == {"lookup"}


def test_a_suggestion_is_verified_as_far_as_its_chances_pay():
    flat_then_steep = CostTable(num_inputs=(1, 4, 128), causal_s=(1.0, 1.1, 60.0), drafting_s=(9.0, 9.0, 90.0))
    chooser = MeasuredChooser(flat_then_steep, has_adapter=True, first_is_exact=False)
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    lengths = []
    for chances in ((0.9, 0.9, 0.9), (0.9, 0.01, 0.9), (0.01,), (0.9,) * 15):
        choice = chooser.choose(g, 1, lambda g, most, own=chances: Suggestion((9,) * len(own), own, 0))
        lengths.append(choice.block_length if choice.kind == "lookup" else 1)
    assert lengths == [4, 2, 1, 4]


@pytest.mark.parametrize(("share", "kind"), [(0.9, "lookup"), (0.7, "quadratic")])
def test_what_is_suggested_is_taken_from_a_share_of_what_drafting_promises(share, kind):
    flat = CostTable(num_inputs=(1, 128), causal_s=(1.0, 1.0), drafting_s=(1.0, 1.0))
    chooser = MeasuredChooser(flat, has_adapter=True, first_is_exact=False)
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    for _ in range(60):
        chooser.note(g, 5, 1)
    best, promised = chooser._best(chooser._of(g).own, chooser._all, 1, 0)
    assert best.kind == "quadratic"
    assert promised == pytest.approx(2.0, abs=0.01)
    # a forward that verifies one draft makes 1 and its chance
    assert chooser.choose(g, 1, lambda g, most: Suggestion((9,), (share * promised - 1.0,), 0)).kind == kind


def test_trust_is_how_much_more_often_suggestions_are_right_than_they_say():
    trust = Trust()
    assert trust.factor(True) == trust.factor(False) == 1.0
    assert trust.factor(True, prior=0.7) == pytest.approx(0.7)
    for _ in range(300):
        trust.note([0.5, 0.5, 0.5], 1)  # the first one always, the second never; the third is never looked at
    assert trust.factor(True) == pytest.approx(2.0, abs=0.2)
    assert trust.factor(False) == pytest.approx(0.0, abs=0.2)
    for _ in range(300):
        trust.note([0.5, 0.5], 0)
    assert trust.factor(True) == pytest.approx(0.0, abs=0.2)


def test_where_every_input_costs_as_much_as_a_forward_nothing_is_looked_up():
    chooser = MeasuredChooser(STEEP, has_adapter=True, first_is_exact=False)
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    assert {choice.kind for choice in rounds(chooser, g, 30, accept=99)} == {"ar"}


def test_lookups_tell_nothing_of_the_block_views_drafts():
    chooser = MeasuredChooser(BENT, has_adapter=True, first_is_exact=False)
    g = tiny_model(3).open_answer([5], {"mode": "self_spec"}).generation
    before = chooser.speeds(chooser._of(g).own, chooser._all, 1)
    rounds(chooser, g, 60, accept=99)
    after = chooser.speeds(chooser._of(g).own, chooser._all, 1)
    assert before == after


def test_a_checkpoint_that_nobody_trained_to_draft_only_verifies_what_its_text_suggests():
    model = tiny_model(1, weight_scale=0.05, mask_token_id=None)
    kwargs = {"max_new_tokens": 60, "ignore_eos": True}
    expected = model.generate([5, 6], mode="ar", **kwargs).token_ids
    answer = model.open_answer([5, 6], kwargs)
    answer.generation.decoder = Auto(MeasuredChooser(FLAT, has_adapter=False, first_is_exact=False, can_draft=False))
    for _ in model._run([answer], None):
        pass
    assert answer.generation.new_tokens == expected
    assert {choice.split()[0] for choice in answer.generation.choices} == {"ar", "lookup"}
    assert answer.stats().mode == "self_spec"
