"""Hints name what was meant, and nothing where nobody can tell."""

import pytest

from trimode.errors import nearest

MODES = ("auto", "ar", "diffusion", "self_spec")
TASKS = ("gsm8k", "humaneval", "json", "copy", "count")


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("difusion", MODES, "diffusion"),
        ("selfspec", MODES, "self_spec"),
        ("JSON", TASKS, "json"),
        ("smol", ["smollm2-135m"], "smollm2-135m"),
        ("--max-tokens", ["--model", "--max-new-tokens"], "--max-new-tokens"),
        ("fast", MODES, None),
        ("nope", TASKS, None),
        ("--foo", ["--stop", "--json"], None),
        ("--modes", ["--rounds"], None),
        ("", MODES, None),
    ],
)
def test_a_hint_is_a_likely_word_or_none(typed, known, meant):
    assert nearest(typed, known) == ("" if meant is None else f" Did you mean {meant!r}?")
