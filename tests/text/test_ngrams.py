"""Tables of n-grams: what was counted, told by counting again; and files that are none."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.checkpoint.ngram_files import read_ngrams, save_ngrams
from trimode.errors import CheckpointError, DataError
from trimode.text.ngrams import LONGEST_CONTEXT, NgramTable, _contexts, count_ngrams

TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 6), max_size=30), st.integers(0, 6)), min_size=1, max_size=25
).filter(lambda texts: any(len(text) > max(given, 1) for text, given in texts))


def counted(texts):
    counts = defaultdict(Counter)
    for text, num_given in texts:
        for i in range(max(num_given, 1), len(text)):
            for n in range(1, min(LONGEST_CONTEXT, i) + 1):
                counts[tuple(text[i - n : i])][text[i]] += 1
    return counts


@settings(deadline=None)
@given(texts=TEXTS, ends=st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=5, max_size=9))
def test_the_longest_known_context_tells_what_followed_it_most_often(texts, ends):
    counts = counted(texts)
    reader = count_ngrams(texts, 7).reader()
    for end in [*ends, *(text[: i + 1] for text, _ in texts[:3] for i in range(len(text)))]:
        expected = None
        for n in range(1, min(LONGEST_CONTEXT, len(end)) + 1):
            followed = counts.get(tuple(end[len(end) - n :]))
            if followed and not (n == LONGEST_CONTEXT and followed.total() < 2):
                expected = min(token for token, times in followed.items() if times == max(followed.values()))
        found = reader.following(end)
        assert (None if found is None else found[0]) == expected
        assert found is None or 0 < found[1] <= 1


def test_chances_are_those_of_texts_that_had_no_part_in_the_counts():
    """Behind 1 comes 2 or 3 by a coin that is as often one as the other; behind 5 comes 6."""
    draws = np.random.default_rng(0)
    texts = [([9, 1, int(draws.integers(2, 4)), 5, 6], 1) for _ in range(4000)]
    reader = count_ngrams(texts, 10).reader()
    assert reader.following([9, 1])[1] == pytest.approx(0.5, abs=0.06)
    token, chance = reader.following([1, 2, 5])
    assert token == 6
    assert chance > 0.97
    # what was seen once or twice is not believed as what was seen a thousand times
    few = count_ngrams([([9, i, i + 1], 1) for i in range(20, 60, 2)], 99).reader()
    assert 0 < few.following([20])[1] < 0.7


def test_of_too_many_contexts_the_most_frequent_stay():
    texts = [([i, i + 1], 1) for i in range(50) for _ in range(i + 1)]
    table = count_ngrams(texts, 60, most=10)
    assert table.num_contexts == 10
    reader = table.reader()
    assert [i for i in range(50) if reader.following([i]) is not None] == list(range(40, 50))


def test_the_same_texts_make_the_same_table_and_contexts_never_seen_are_not_known():
    draws = np.random.default_rng(1)
    texts = [(draws.integers(0, 40_000, 50).tolist(), 3) for _ in range(300)]
    table, again = count_ngrams(texts, 49152), count_ngrams(iter(texts), 49152)
    assert np.array_equal(table.slots, again.slots)
    assert table.num_contexts > 10_000
    reader = table.reader()
    assert not any(reader.following([token]) for token in range(40_000, 49_000))
    assert reader.following([]) is None


def test_contexts_spread_over_the_table_as_random_numbers_would():
    """Else a search runs through rows of them. Ids as a made-up text has them: few frequent ones, and many that are rare."""
    ids = (np.random.default_rng(0).zipf(1.3, 600_000) % 49152).tolist()
    keys, _, _ = _contexts([(ids, 0)])
    for key in keys:
        distinct = np.unique(key[key != 0])
        parts = np.bincount((distinct >> np.uint64(52)).astype(int), minlength=4096)
        assert parts.std() / parts.mean() ** 0.5 < 1.1  # 1.27 of pairs that are not mixed


def test_nothing_to_count_is_an_error():
    for texts in ([], [([], 0)], [([5], 0)], [([5, 6], 2)]):
        with pytest.raises(DataError, match="nothing to count"):
            count_ngrams(texts, 10)


def test_a_table_survives_its_file(tmp_path):
    table = count_ngrams([([1, 2, 3, 4], 1)] * 3, 10)
    path = tmp_path / "ngrams.safetensors"
    assert read_ngrams(path, 10) is None
    save_ngrams(path, table)
    found = read_ngrams(path, 10)
    assert np.array_equal(found.slots, table.slots)
    assert (found.num_contexts, found.vocab_size) == (table.num_contexts, 10)
    assert found.reader().following([1, 2]) == table.reader().following([1, 2])


def test_a_table_takes_the_place_of_a_link_and_not_of_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_text("everybody's")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    save_ngrams(tmp_path / "link", count_ngrams([([1, 2, 3, 4], 1)] * 3, 10))
    assert (tmp_path / "blob").read_text() == "everybody's"
    assert not (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "link"]


def test_what_is_no_table_for_the_model_is_refused_in_one_line(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "ngrams.safetensors"
    facts = {"version": 1, "vocab_size": 10, "num_contexts": 0}
    good = np.zeros(4, np.uint64)

    def written(tensors, **changes):
        told = {name: value for name, value in {**facts, **changes}.items() if value is not None}
        return lambda: save_file(tensors, path, metadata={"ngrams": json.dumps(told)})

    cases = [
        (lambda: path.write_bytes(b"garbage"), ""),
        (written({"slots": good}, vocab_size=11), "vocabulary of 11"),
        (written({"slots": good}, version=2), "version is 2"),
        (written({"slots": good}, num_contexts=None), "num_contexts"),
        (written({"slots": good}, num_contexts="many"), "many"),
        (written({"slots": good}, num_contexts=-5), "-5"),
        (written({"slots": good}, num_contexts=4), "num_contexts is 4"),
        (written({"slots": good}, num_contexts=float("inf")), "inf"),
        (lambda: save_file({"slots": good}, path, metadata={"ngrams": "[" * 100_000}), ""),
        (written({"other": good}), "slots"),
        (written({"slots": np.zeros(3, np.uint64)}), "2, 4, 8"),
        (written({"slots": np.zeros((2, 2), np.uint64)}), "2, 4, 8"),
        (written({"slots": np.ones(4, np.uint64)}), "no slot is free"),
        (written({"slots": np.zeros(4, np.float32)}), "64 bits"),
        (lambda: save_file({"slots": good}, path), "version is None"),
        (lambda: save_file({"slots": good}, path, metadata={"ngrams": "[]"}), ""),
        (lambda: save_file({"slots": good}, path, metadata={"ngrams": "{"}), ""),
    ]
    for write, fault in cases:
        write()
        with pytest.raises(CheckpointError, match="no table of n-grams") as error:
            read_ngrams(path, 10)
        assert fault in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_ngrams(tmp_path / "none" / "x", NgramTable(good, 0, 10))


def test_a_token_beyond_the_vocabulary_is_never_told():
    table = count_ngrams([([1, 20], 1)] * 3, 30)
    assert table.reader().following([1])[0] == 20
    assert NgramTable(table.slots, table.num_contexts, 10).reader().following([1]) is None
