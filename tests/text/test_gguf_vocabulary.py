"""A tokenizer from GGUF metadata is the tokenizer that the file was made from."""

import itertools
import json
import time
import tracemalloc

import pytest
import regex
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trimode.errors import CheckpointError, UnsupportedModelError
from trimode.text import Tokenizer
from trimode.text.tokenizer import _BYTE_OF_CHARACTER

TEXTS = [
    "Hello world",
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tx",
    "a  b   c    d",
    "trailing   ",
    "  leading",
    "It's we'll they've I'M DON'T 's",
    "naïve café — “quotes” …",
    "日本語のテキスト。한국어 텍스트, русский текст, نص عربي, עברית",
    "e\u0301 versus é",
    "😀👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "x=1+22*333/4444 -55555",
    "3.14159 and 1,000,000 in 2024",
    "½ Ⅷ ٣ 一 ①",
    "def f(x):\n    return x**2  # square\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2, null], "b": "\\n"}',
    "<html><body class='x'>&amp;</body></html>",
    "http://example.com/a/b?c=d&e=f#g",
    "line one\r\nline two\r\n\r\nline three",
    "CamelCaseWords and snake_case_words and SCREAMING_CASE",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|>",
    "not special: <|im_start>",
    "\u200b\ufeff\u00a0\u2003x",
    "\x00\x01\x7f",
    "supercalifragilisticexpialidocious " * 3,
]

# Where transformers' reading of this file differs from the original tokenizer.json (which cuts out each digit first):
# blanks before a digit, and runs of the digits of other scripts.
CUT_DIFFERENTLY = regex.compile(r"\s\p{N}|[^\P{N}0-9]")

CUTTINGS = {
    "smollm": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


class PlainByteLevelBpe:
    """The oracle in plain Python: cut, spell as bytes, join the best-ranked neighbours until none are left."""

    def __init__(self, metadata, cuttings, *, whole_words):
        self.ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        kinds = metadata["tokenizer.ggml.token_type"]
        special = [token for token, kind in zip(self.ids, kinds, strict=True) if kind in (3, 4)]
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
        self.cuttings = [regex.compile(cutting) for cutting in cuttings]
        self.whole_words = whole_words
        self.spelling = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}

    def encode(self, text):
        ids = []
        for index, stretch in enumerate(self.special.split(text)):
            ids += (
                [self.ids[stretch]] if index % 2 else [id for word in self.words(stretch) for id in self.merged(word)]
            )
        return ids

    def words(self, stretch):
        words = [stretch] if stretch else []
        for cutting in self.cuttings:
            words = [piece for word in words for piece in pieces(cutting, word)]
        return words

    def merged(self, word):
        parts = [self.spelling[byte] for byte in word.encode()]
        if self.whole_words and "".join(parts) in self.ids:
            return [self.ids["".join(parts)]]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: self.ranks.get((parts[i], parts[i + 1]), 1 << 60))
            if (parts[best], parts[best + 1]) not in self.ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [self.ids[part] for part in parts]


def pieces(cutting, word):
    """Matches and the stretches between them, in order."""
    found, at = [], 0
    for match in cutting.finditer(word):
        found += [word[at : match.start()], match.group()]
        at = match.end()
    return [piece for piece in [*found, word[at:]] if piece]


@pytest.fixture(scope="module", params=list(CUTTINGS))
def family(request, smollm_metadata):
    """SmolLM2's vocabulary under each family's rules, and the plain oracle for it."""
    tokenizer = Tokenizer.from_gguf_metadata(smollm_metadata | {"tokenizer.ggml.pre": request.param})
    oracle = PlainByteLevelBpe(
        smollm_metadata, CUTTINGS[request.param], whole_words=request.param in ("llama-bpe", "tekken")
    )
    # Qwen's tokenizers compose characters first; the oracle gets composed text.
    composed = (lambda text: text.replace("e\u0301", "é")) if request.param == "qwen2" else (lambda text: text)
    return tokenizer, lambda text: oracle.encode(composed(text))


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_ids_are_those_of_transformers_where_both_cut_digits_alike(smollm, smollm_oracle, text):
    if not CUT_DIFFERENTLY.search(text):
        assert smollm.encode(text) == smollm_oracle.encode(text, add_special_tokens=False)
        assert smollm.encode(text, add_special_tokens=True) == smollm_oracle.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_text_is_that_of_transformers(smollm, smollm_oracle, text):
    ids = smollm_oracle.encode(text, add_special_tokens=False)
    for skip in (True, False):
        expected = smollm_oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert smollm.decode(ids, skip_special_tokens=skip) == expected


def test_blanks_before_a_digit_stay_together_unlike_in_transformers_reading(smollm, smollm_oracle):
    # The original tokenizer.json cuts digits out first, so the two spaces are one word and one token. transformers
    # reads every unknown `pre` as GPT-2's, whose pattern gives the second space to the digit.
    assert [smollm.id_to_token(token_id) for token_id in smollm.encode("  12")] == ["ĠĠ", "1", "2"]
    oracle_ids = smollm_oracle.encode("  12", add_special_tokens=False)
    assert smollm_oracle.convert_ids_to_tokens(oracle_ids) == ["Ġ", "Ġ", "1", "2"]


@pytest.mark.parametrize("text", TEXTS)
def test_each_family_cuts_and_merges_as_the_plain_oracle_does(family, text):
    tokenizer, encode = family
    assert tokenizer.encode(text) == encode(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("aeésT  \n\n\r\t'12٣½.,-/_(日本한ʰǅ\u0301😀👍\u200d"), max_size=24))
def test_each_family_cuts_and_merges_any_text_as_the_plain_oracle_does(family, text):
    tokenizer, encode = family
    if "\u0301" not in text:  # composing is tested by the fixed texts
        assert tokenizer.encode(text) == encode(text)


def absent_bytes(tokenizer):
    """Bytes that a byte-level vocabulary has no token for; SmolLM2's lacks those that its training text did not hold."""
    return {byte for character, byte in _BYTE_OF_CHARACTER.items() if tokenizer.token_to_id(character) is None}


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_encoding_then_decoding_gives_the_text_back(smollm, text):
    assume(absent_bytes(smollm).isdisjoint(text.encode()))
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def test_a_byte_without_a_token_is_lost_as_in_transformers(smollm, smollm_oracle):
    lost = min(absent_bytes(smollm) & {0xF1, 0xF2, 0xF3})
    text = f"a{bytes([lost, 0x80, 0x80, 0x80]).decode()}b"
    ids = smollm.encode(text)
    assert ids == smollm_oracle.encode(text, add_special_tokens=False)
    assert smollm.decode(ids) == "a\ufffd\ufffd\ufffdb"


def test_a_49k_vocabulary_is_built_quickly_and_in_little_memory(smollm_metadata):
    # Measured: 0.10 s and 12 MB of Python objects. The bounds leave room for a busy machine, not for a second copy of
    # the vocabulary (about 12 MB each).
    started = time.process_time()
    Tokenizer.from_gguf_metadata(smollm_metadata)
    assert time.process_time() - started < 1.5
    tracemalloc.start()
    try:
        Tokenizer.from_gguf_metadata(smollm_metadata)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_control_tokens_are_special_and_user_defined_tokens_are_found_but_shown(bytes_metadata):
    tokenizer = Tokenizer.from_gguf_metadata(bytes_metadata)
    ids = tokenizer.encode("<think>ab<|end|>")
    assert ids == [258, 256, 257]
    assert tokenizer.special_ids == {257}
    assert tokenizer.decode(ids) == "<think>ab"
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)])
def test_a_word_that_is_a_token_is_taken_whole_where_the_family_says_so(bytes_metadata, pre, whole):
    # "ba" is a token, but no merge leads to it.
    bytes_metadata["tokenizer.ggml.tokens"][258] = "ba"
    bytes_metadata["tokenizer.ggml.token_type"][258] = 1
    tokenizer = Tokenizer.from_gguf_metadata(bytes_metadata | {"tokenizer.ggml.pre": pre})
    assert (tokenizer.encode("ba") == [258]) == whole
    assert tokenizer.decode(tokenizer.encode("ba")) == "ba"


def test_metadata_names_special_tokens_and_chat_templates(bytes_metadata):
    tokenizer = Tokenizer.from_gguf_metadata(
        bytes_metadata | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 257)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (None, None)
    assert tokenizer.chat_template == "plain"
    assert tokenizer.named_chat_templates == {"default": "plain", "tool_use": "tools"}


@pytest.mark.parametrize(("pre", "written", "starts"), [("llama-bpe", None, True), ("llama-bpe", False, False),
                                                        ("gpt-2", None, False), ("gpt-2", True, True)])  # fmt: skip
def test_the_first_token_is_added_when_the_file_or_its_family_says_so(bytes_metadata, pre, written, starts):
    metadata = bytes_metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 257}
    if written is not None:
        metadata["tokenizer.ggml.add_bos_token"] = written
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("ab", add_special_tokens=True) == ([257, 256] if starts else [256])
    assert tokenizer.encode("ab") == [256]


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "no_vocab"}])
def test_metadata_without_a_vocabulary_gives_no_tokenizer(metadata):
    assert Tokenizer.from_gguf_metadata(metadata) is None


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones(bytes_metadata):
    with pytest.raises(UnsupportedModelError, match=r"'qwen3'.*Known: default, gpt-2, .*smollm.*Did you mean 'qwen2'"):
        Tokenizer.from_gguf_metadata(bytes_metadata | {"tokenizer.ggml.pre": "qwen3"})


def test_an_unknown_kind_of_vocabulary_is_refused(bytes_metadata):
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported"):
        Tokenizer.from_gguf_metadata(bytes_metadata | {"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["a c"]}, "'a c', which joins no two tokens"),
        ({"merges": ["ab"]}, "'ab', which joins no two tokens"),
        ({"token_type": [1]}, "1 entries for 259 tokens"),
        ({"eos_token_id": 259}, "eos_token_id is 259, outside"),
    ],
)
def test_contradictory_metadata_is_named(bytes_metadata, change, complaint):
    metadata = bytes_metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(CheckpointError, match=complaint):
        Tokenizer.from_gguf_metadata(metadata)


def test_a_token_that_stands_twice_is_named(bytes_metadata):
    bytes_metadata["tokenizer.ggml.tokens"][257] = "ab"
    with pytest.raises(CheckpointError, match="holds 'ab' twice"):
        Tokenizer.from_gguf_metadata(bytes_metadata)


# ---- SentencePiece


def plain_sentencepiece(metadata, text):
    """The oracle: join the neighbours that make the best-scored piece, leftmost first, until none are left."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = {token for token, kind in zip(tokens, kinds, strict=True) if kind == 1}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in pieces]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    encoded = []
    for part in parts:
        encoded += [ids[part]] if part in pieces else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return encoded


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("hello  world chow.0é😀日s>"), max_size=24))
def test_scores_merge_as_sentencepiece_does(sentencepiece, sentencepiece_metadata, text):
    ids = sentencepiece.encode(text)
    assert ids == plain_sentencepiece(sentencepiece_metadata, text)
    assert sentencepiece.decode(ids) == text


def test_merges_derived_from_scores_are_those_of_transformers(sentencepiece_metadata):
    oracle = pytest.importorskip("transformers.tokenization_utils_base")
    # Normal pieces only: transformers would also build control tokens from merges.
    normal = {
        token: (index, score)
        for index, (token, score, kind) in enumerate(
            zip(*(sentencepiece_metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")),
                strict=True)
        )
        if kind == 1
    }  # fmt: skip
    expected = oracle.generate_merges(
        {token: index for token, (index, _) in normal.items()}, {token: score for token, (_, score) in normal.items()}
    )
    model = json.loads(Tokenizer.from_gguf_metadata(sentencepiece_metadata)._backend.to_str())["model"]
    assert [tuple(merge) for merge in model["merges"]] == expected


def test_control_tokens_are_found_in_text_but_the_spelling_of_a_byte_token_is_only_text(sentencepiece_metadata):
    # Pieces that lead up to "<0x41>": merging the last two would smuggle in the byte token for "A".
    steps = ["x", "4", "1", "<0", "<0x", "<0x4", "<0x41"]
    grown = {"tokens": steps, "token_type": [1] * len(steps), "scores": [-100.0 - n for n in range(len(steps))]}
    grown = {f"tokenizer.ggml.{key}": values for key, values in grown.items()}
    tokenizer = Tokenizer.from_gguf_metadata(
        sentencepiece_metadata | {key: sentencepiece_metadata[key] + values for key, values in grown.items()}
    )
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("<s>") == [1]
    ids = tokenizer.encode("<0x41>")
    assert [tokenizer.id_to_token(token_id) for token_id in ids] == ["▁", "<0x41", ">"]
    assert tokenizer.decode(ids) == "<0x41>"


def test_sentencepiece_text_starts_with_bos_and_without_a_blank(sentencepiece):
    ids = sentencepiece.encode("hello world", add_special_tokens=True)
    assert [sentencepiece.id_to_token(token_id) for token_id in ids] == ["<s>", "▁hello", "▁world"]
    assert sentencepiece.decode(ids) == "hello world"


def test_without_a_space_prefix_text_is_taken_as_it_is(sentencepiece_metadata):
    tokenizer = Tokenizer.from_gguf_metadata(sentencepiece_metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode("he")] == ["he"]
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"


def test_a_sentencepiece_file_without_scores_is_refused(sentencepiece_metadata):
    metadata = {key: value for key, value in sentencepiece_metadata.items() if not key.endswith("scores")}
    with pytest.raises(CheckpointError, match=r"no tokenizer\.ggml\.scores"):
        Tokenizer.from_gguf_metadata(metadata)
