"""Grammars over a real vocabulary: what they allow is what can still match, and asking about drafts changes nothing."""

import json
import re

import pytest

import trimode
from trimode.errors import GrammarError

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer():
    from trimode.checkpoint import open_checkpoint

    return open_checkpoint("smollm2-135m").tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    from trimode.text.grammar import Grammars

    return Grammars(tokenizer, 49152, [2])


def test_only_what_can_still_match_is_allowed(grammars, tokenizer):
    state = grammars.compile("regex", "(yes|no|never)").start()
    words = {tokenizer.decode([int(i)]) for i in state.allowed([]).nonzero()[:, 0]}
    assert {"yes", "no", "y", "n"} <= words
    assert all(any(whole.startswith(w) for whole in ("yes", "no", "never")) for w in words)
    yes = tokenizer.encode("yes")
    assert state.allowed(yes).nonzero()[:, 0].tolist() == [2]


def test_the_answer_may_change_its_end_at_any_time(grammars, tokenizer):
    grammar = grammars.compile("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}})
    texts = ['{"a"', '{"a": 12', "{", '{"a": 12}', '{"a": 12x', '{"a": 7', ""]
    used = grammar.start()
    for text in [*texts, *reversed(texts)]:
        ids = tokenizer.encode(text)
        assert (used.allowed(ids) == grammar.start().allowed(ids)).all(), text


def test_behind_the_end_and_behind_what_is_forbidden_only_the_end_of_the_text_follows(grammars, tokenizer):
    state = grammars.compile("regex", "[0-9]{3}").start()
    for text in ("123", "abc", "1234"):
        assert state.allowed(tokenizer.encode(text)).nonzero()[:, 0].tolist() == [2]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "("),
        ("regex", ""),
        ("regex", 7),
        ("lark", "start: nothing_of_this"),
        ("json_schema", {"type": "objekt"}),
        ("json_schema", "{}"),
        ("json_object", {}),
        ("jsonschema", {}),
        ("regex", "a" * 200_000),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_grammar_that_cannot_be_used_is_one_clear_line(grammars, kind, source):
    with pytest.raises(GrammarError) as caught:
        grammars.compile(kind, source)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_embedded_model_answers_in_json_in_every_mode():
    model = trimode.load("smollm2-135m", dtype="float32", threads=1)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 99999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    grammar = model.grammar("json_schema", schema)
    asked = "Give me a city and how many people live there, as JSON."
    outs = {
        m: model.generate(asked, mode=m, grammar=grammar, max_new_tokens=60) for m in ("ar", "self_spec", "diffusion")
    }
    assert outs["self_spec"].token_ids == outs["ar"].token_ids
    for out in outs.values():
        assert set(json.loads(out.text)) == {"city", "people"}
    digits = model.generate("Count.", mode="ar", grammar=model.grammar("regex", "[0-9]{3}-[0-9]{4}"))
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", digits.text)
