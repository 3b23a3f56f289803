"""What the text itself suggests: of the latest places the one with the longest run that the text ends with, and what followed there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import tiny_model
from trimode.decoding.lookup import LONGEST, MOST_PLACES, SHORTEST, Match, TextIndex
from trimode.errors import SettingError


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


def test_knobs_that_a_lookup_has_no_use_for_are_refused():
    model = tiny_model(5)
    for knob, value in (("threshold", 0.5), ("draft_lora", True)):
        with pytest.raises(SettingError, match="lookup"):
            model.generate([5], mode="self_spec", self_spec_kind="lookup", **{knob: value})
