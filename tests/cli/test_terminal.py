"""Renderables: what is settled stays, masks are told from tokens, control characters are not obeyed."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trimode.viz import terminal


def drawn(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def test_a_canvas_shows_committed_text_then_tokens_then_masks():
    view = terminal.canvas_view("The", [" sky", None, "\n", None])
    assert view.plain == "The sky░⏎░"
    assert {(span.start, span.end, str(span.style)) for span in view.spans} == {
        (3, 7, "cyan"),
        (7, 8, "dim"),
        (8, 9, "cyan"),
        (9, 10, "dim"),
    }


def test_without_an_open_block_only_the_text_is_shown():
    assert terminal.canvas_view("The sky", None).plain == "The sky"


def test_a_long_line_is_broken_at_its_last_space():
    assert terminal.settled("one two three", 9) == (["one two"], "three")
    assert terminal.settled("abcdefgh", 3) == (["abc", "def"], "gh")
    assert terminal.settled("a\n\nb", 9) == (["a", ""], "b")


@given(st.text(alphabet="ab \n日", max_size=60), st.integers(2, 12))
def test_settling_loses_only_line_ends(text, width):
    lines, tail = terminal.settled(text, width)
    assert "".join([*lines, tail]).replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert terminal.cell_len(tail) <= width


@given(st.text(alphabet="ab \n", max_size=60), st.integers(2, 12), st.integers(1, 5))
def test_settling_piece_by_piece_settles_the_same_lines(text, width, step):
    lines, tail = [], ""
    for start in range(0, len(text), step):
        settled, tail = terminal.settled(tail + text[start : start + step], width)
        lines += settled
    assert (lines, tail) == terminal.settled(text, width)


def test_control_characters_are_replaced_and_line_breaks_kept():
    assert terminal.harmless("a\x1b[0m\tb\n\x9bé") == "a\N{REPLACEMENT CHARACTER}[0m\tb\n\N{REPLACEMENT CHARACTER}é"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (98_223_104, "98.2 MB"),
        (999_960_000, "1.00 GB"),
        (10**13, "10.0 TB"),
    ],
)
def test_sizes_have_three_digits(number, told):
    assert terminal.readable_bytes(number) == told


def test_the_statistics_tell_revisions_and_acceptance_only_where_there_are_any():
    stats = {
        "mode": "diffusion",
        "tokens": 64,
        "seconds": 1.5,
        "tokens_per_second": 42.7,
        "nfe_prefill": 1,
        "nfe_decode": 20,
        "decode_tpf": 3.2,
        "acceptance_length": None,
        "revised": 0,
    }
    line = "diffusion · 64 tokens · 1.50 s · 42.7 tokens/s · 1 + 20 forwards · 3.20 tokens/forward"
    assert terminal.stats_line(stats).plain == line
    drafted = {**stats, "mode": "self_spec", "self_spec_kind": "lookup"}
    assert terminal.stats_line(drafted).plain == line.replace("diffusion", "self_spec lookup")
    both = {**stats, "acceptance_length": 3.0, "revised": 2}
    assert terminal.stats_line(both).plain == line + " · 3.00 a round · 2 revised"


def test_markup_in_a_path_is_shown_as_it_stands():
    from tests.cli.test_info import FACTS

    engine = {"name": "torch", "kernels": None, "precision": "float32", "why": "."}
    page = terminal.info_page(
        {**FACTS, "path": "/tmp/[bold]x[/bold]", "runs_here": {}, "engine": engine},
        {"memory_bytes": None, "available_bytes": None},
    )
    assert "/tmp/[bold]x[/bold]" in drawn(page)
