"""What the text itself suggests: of the latest places the one with the longest run that the text ends with, and what followed there."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import tiny_model
from trimode.decoding.lookup import (
    GOES_ON,
    LIKELY,
    LONGEST,
    MOST_PLACES,
    SHORTEST,
    LookupSelfSpeculation,
    Match,
    TextIndex,
)
from trimode.errors import SettingError
from trimode.text.ngrams import count_ngrams


def found_by_reading(text):
    places = [i for i in range(len(text) - 1, SHORTEST - 1, -1) if text[i - SHORTEST : i] == text[-SHORTEST:]]
    for n in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        for start in places[:MOST_PLACES]:
            if start >= n and text[start - n : start] == text[-n:]:
                return Match(n, start)
    return None


@given(text=st.lists(st.integers(0, 3), max_size=120), cuts=st.lists(st.integers(1, 9), max_size=9))
def test_a_match_is_what_reading_the_whole_text_finds_however_the_text_grew(text, cuts):
    index, end = TextIndex(), 0
    for cut in [*cuts, len(text)]:
        end = min(len(text), end + cut)
        assert index.match(text[:end]) == found_by_reading(text[:end])


def test_what_followed_is_drafted_and_a_text_that_repeats_itself_is_taken_to_go_on():
    assert Match(2, 2).drafts([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert TextIndex().match([7, 1, 2, 1, 2]) == Match(2, 3)
    assert Match(2, 3).drafts([7, 1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1]


def test_an_answer_that_repeats_itself_takes_fewer_forwards_and_is_the_same():
    """Greedy answers of a tiny model with random weights run in circles."""
    model = tiny_model(1, weight_scale=0.05)
    kwargs = {"max_new_tokens": 60, "ignore_eos": True}
    ar = model.generate([5, 6], mode="ar", **kwargs)
    out = model.generate([5, 6], mode="self_spec", self_spec_kind="lookup", block_length=5, **kwargs)
    assert out.token_ids == ar.token_ids
    assert out.stats.nfe_decode < 0.6 * ar.stats.nfe_decode
    assert out.stats.acceptance_length > 2
    one = model.generate([5, 6], mode="self_spec", self_spec_kind="lookup", block_length=1, **kwargs)
    assert one.token_ids == ar.token_ids
    assert one.stats.nfe_decode == ar.stats.nfe_decode


def suggested(prompt, texts, most=4, max_new_tokens=20):
    """What is suggested behind a prompt that was read up to its last token."""
    ngrams = None if texts is None else count_ngrams([(text, 0) for text in texts], 40)
    g = tiny_model(1).open_answer(prompt, {"mode": "self_spec", "max_new_tokens": max_new_tokens}).generation
    g.cached = len(prompt) - 1
    assert LookupSelfSpeculation(ngrams).suggest(g, most) is None  # the prompt is not read yet
    g.final.append(prompt[-1])
    g.cached += 1
    return LookupSelfSpeculation(ngrams).suggest(g, most)


OFTEN = [[20, 21, 22, 23, 24]] * 400
"""A table that is sure."""


def test_without_a_table_the_text_alone_suggests():
    assert suggested([5, 6, 7, 8], None) is None
    found = suggested([5, 6, 6, 7, 8, 5, 6], None)
    assert (found.tokens, found.length) == ((7, 8, 5, 6), 3)
    assert found.chances == (LIKELY[3], GOES_ON, GOES_ON, GOES_ON)


def test_a_table_speaks_where_the_text_does_not():
    found = suggested([5, 20], [*OFTEN, [20, 20, 21, 22]], most=9)
    assert found.length == 0
    assert found.tokens == (21, 22, 23, 24)  # as far as it knows
    assert len(suggested([5, 20], [*OFTEN, [20, 20, 21, 22]], most=3).tokens) == 3
    assert all(0 < chance <= 1 for chance in found.chances)
    # "9 20" was followed by "20" here, and no table knows better
    behind = suggested([9, 9, 20, 9], OFTEN, most=9)
    assert behind.tokens[:2] == (20, 9)
    assert behind.length == 2
    assert suggested([5, 6], OFTEN) is None


def test_a_table_that_is_surer_than_the_text_is_believed():
    text = [21, 22, 30, 31, 21, 22]  # the text went on with 30, the table says 23
    g = tiny_model(1).open_answer(text, {"mode": "self_spec", "max_new_tokens": 20}).generation
    g.final.append(22)
    g.final[-2:] = [21, 22]
    g.cached = len(g.final) - 1
    both = LookupSelfSpeculation(count_ngrams([(one, 0) for one in OFTEN], 40)).suggest(g, 3)
    assert both.tokens == (23, 24)
    assert both.length == 0
    # where both say the same the surer chance counts
    g.final[-3:] = [23, 31, 21, 22]
    g.final[:3] = [21, 22, 23]
    g.cached = len(g.final) - 1
    same = LookupSelfSpeculation(count_ngrams([(one, 0) for one in OFTEN], 40)).suggest(g, 3)
    assert (same.tokens[0], same.length) == (23, 2)
    assert same.chances[0] > LIKELY[2]


def test_what_a_table_hardly_knows_is_not_drafted():
    """One of four follows each token, whichever: one draft may be right, two in a row hardly are."""
    draws = random.Random(0)
    found = suggested([5, 20], [[draws.choice([20, 21, 22, 23]) for _ in range(50)] for _ in range(400)], most=9)
    assert len(found.tokens) == 1
    assert found.chances[0] == pytest.approx(0.25, abs=0.1)


def test_a_table_that_is_less_sure_than_the_text_is_not():
    unsure = count_ngrams([([9, 21, 22, 23 + i % 10], 1) for i in range(400)], 40)
    assert unsure.reader().following([21, 22])[1] < LIKELY[2]
    g = tiny_model(1).open_answer([21, 22, 36, 37, 5, 21], {"mode": "self_spec", "max_new_tokens": 20}).generation
    g.final.append(22)
    g.cached = len(g.final) - 1
    found = LookupSelfSpeculation(unsure).suggest(g, 2)
    assert (found.tokens, found.chances, found.length) == ((36, 37), (LIKELY[2], GOES_ON), 2)


def test_fewer_tokens_than_were_found_are_the_first_of_them_and_are_not_looked_for_again():
    lookup = LookupSelfSpeculation()
    g = tiny_model(1).open_answer([5, 6, 7, 8, 5], {"mode": "self_spec", "max_new_tokens": 20}).generation
    g.final.append(6)
    g.cached = len(g.final) - 1
    found = lookup.suggest(g, 6)
    assert len(found.tokens) == 6
    assert lookup.suggest(g, 2) == found.first(2)
    assert lookup.suggest(g, 6) is found
    assert lookup.suggest(g, 0) is None
    assert len(lookup.suggest(g, 9).tokens) == 9


def test_knobs_that_a_lookup_has_no_use_for_are_refused():
    model = tiny_model(5)
    for knob, value in (("threshold", 0.5), ("draft_lora", True)):
        with pytest.raises(SettingError, match="lookup"):
            model.generate([5], mode="self_spec", self_spec_kind="lookup", **{knob: value})
