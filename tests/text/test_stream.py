"""Streamed pieces joined are the whole text, and a stop string cuts it at the same place however it arrives."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimode.errors import SettingError
from trimode.text import StopMatcher, TextStream, Tokenizer


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    return [stream.push(token_id) for token_id in ids] + [stream.finish()]


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders
    from tokenizers.models import WordPiece

    tokens = ["[UNK]", "he", "##llo", "wor", "##ld", ".", "'", "s", "n't", "##�", "�", "日"]
    backend = Backend(WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend, special_tokens={"unk_token": "[UNK]"})


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders
    from tokenizers.models import Unigram

    pieces = ["<unk>", "▁", "▁he", "llo", "▁▁", "日", "�", "e"]
    backend = Backend(Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def nested_bytes(smollm, tmp_path_factory) -> Tokenizer:
    """Byte-level, but hidden in a sequence of decoders, so that the stream cannot see the bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders

    directory = tmp_path_factory.mktemp("nested")
    smollm.save(directory)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return Tokenizer(backend)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49200), max_size=40), skip=st.booleans())
def test_streamed_pieces_joined_are_the_whole_text(smollm, ids, skip):
    pieces = streamed(smollm, ids, skip_special_tokens=skip)
    assert "".join(pieces) == smollm.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=24) | st.text(max_size=8).map(str.encode))
def test_streamed_pieces_joined_are_the_whole_text_when_every_token_is_one_byte(smollm, raw):
    single = {smollm.token_bytes(token_id): token_id for token_id in range(17, 17 + 400)}
    ids = [single[bytes([byte])] for byte in raw if bytes([byte]) in single]
    assert "".join(streamed(smollm, ids)) == smollm.decode(ids)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_pieces_joined_are_the_whole_text_with_byte_fallback(sentencepiece, data, skip):
    # Few bytes, chosen so that whole, half and broken characters all occur, between pieces with and without blanks.
    bytes_of = [3 + byte for byte in (0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0x41)]
    others = [0, 1, 2, 9999, *range(259, sentencepiece.vocab_size)]
    ids = data.draw(st.lists(st.sampled_from(bytes_of) | st.sampled_from(others), max_size=24))
    pieces = streamed(sentencepiece, ids, skip_special_tokens=skip)
    assert "".join(pieces) == sentencepiece.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_pieces_joined_are_the_whole_text_for_other_vocabularies(request, kind, data, skip):
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=20))
    pieces = streamed(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_a_decoder_of_unknown_make_streams_whole_characters_too(nested_bytes, text):
    ids = nested_bytes.encode(text)
    assume(nested_bytes.decode(ids, skip_special_tokens=False) == text)  # some bytes have no token in this vocabulary
    assert "".join(streamed(nested_bytes, ids, skip_special_tokens=False)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("aé日😀👩‍👧 \n"), max_size=20))
def test_no_piece_holds_half_a_character(smollm, sentencepiece, text):
    for tokenizer in (smollm, sentencepiece):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text


def test_plain_text_is_shown_as_soon_as_its_token_arrives(smollm, sentencepiece):
    for tokenizer in (smollm, sentencepiece):
        pieces = streamed(tokenizer, tokenizer.encode("hello world hello world"))
        assert all(pieces[:-1])
        assert pieces[-1] == ""


def test_a_character_is_shown_with_its_last_byte(smollm):
    ids = smollm.encode("😀")
    assert len(ids) > 1
    assert streamed(smollm, ids) == [""] * (len(ids) - 1) + ["😀", ""]


def test_finish_shows_an_unfinished_character_once(smollm):
    stream = TextStream(smollm)
    assert stream.push(smollm.encode("😀")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_run_of_bytes_is_shown_when_it_is_closed(sentencepiece):
    ids = [*(3 + byte for byte in "é".encode()), sentencepiece.token_to_id("▁hello")]
    assert streamed(sentencepiece, ids) == ["", "", "é hello", ""]


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece", "nested_bytes"])
def test_the_cost_of_a_push_does_not_grow_with_the_text(request, kind, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    lengths, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    ids = [token_id for token_id in range(260, 270) if tokenizer.id_to_token(token_id)] or [1, 2, 3]
    stream = TextStream(tokenizer)
    for token_id in ids * 200:
        stream.push(token_id)
    assert max(lengths) <= 16


# ---- stop strings


def cut(text, stops):
    """The oracle: walk the text; at the first place where a stop string ends, cut before the one that began earliest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pieces_of(text, cuts):
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


texts = st.text(st.sampled_from("abc"), max_size=24)
stop_lists = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4)


@settings(max_examples=500, deadline=None)
@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 30), max_size=12))
def test_any_split_shows_the_text_up_to_the_first_stop(text, stops, cuts):
    matcher = StopMatcher(stops)
    shown, hits = "", [False]
    for piece in pieces_of(text, cuts):
        safe, hit = matcher.push(piece)
        shown += safe
        hits.append(hit)
    expected, stopped = cut(text, stops)
    assert shown + matcher.finish() == expected
    assert hits[-1] == stopped
    assert hits == sorted(hits)  # once hit, always hit


@settings(max_examples=500, deadline=None)
@given(text=texts, stops=stop_lists)
def test_nothing_shown_turns_out_to_begin_a_stop(text, stops):
    matcher, shown = StopMatcher(stops), ""
    expected, _ = cut(text, stops)
    for character in text:
        safe, _ = matcher.push(character)
        shown += safe
        assert expected.startswith(shown)


@settings(max_examples=300, deadline=None)
@given(text=texts, stops=stop_lists)
def test_what_cannot_begin_a_stop_is_shown_at_once(text, stops):
    shown, hit = StopMatcher(stops).push(text)
    if not hit:
        held = text[len(shown) :]
        begins = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == max(begins, key=len, default="")


def test_the_stop_that_is_complete_first_wins_and_of_two_that_end_together_the_longer():
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", True)
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", True)


def test_after_a_stop_nothing_is_shown():
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", False)
    assert matcher.push("D two") == ("", True)
    assert matcher.push("three END") == ("", True)
    assert matcher.finish() == ""


def test_what_was_held_is_given_back_at_the_end():
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("line\n") == ("line", False)
    assert matcher.finish() == "\n"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], "END"])
def test_a_stop_must_be_a_string_with_something_in_it(stops):
    with pytest.raises(SettingError, match="stop string"):
        StopMatcher(stops)
