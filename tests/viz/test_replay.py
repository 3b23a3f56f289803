"""A trace is shown as it was written, and whatever else a file holds is refused in one line."""

import json
import re
import shutil
import subprocess

import pytest

import trimode
from tests.worlds import tiny_model
from trimode.cli.app import run
from trimode.errors import DataError
from trimode.viz.replay import forward_line, page, read_trace, standing

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(**changes):
    whole = {
        "request": 0,
        "block": 0,
        "step": 0,
        "kind": "denoise",
        "committed": [],
        "revised": 0,
        "accepted": None,
        "seconds": 0.01,
        "inputs": 4,
        "canvas": [],
        "rejected": [],
        "texts": {"5": " five", "6": " six", "7": "</script>\n<b>"},
    }
    return {**whole, **changes}


def written(tmp_path, *records):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records))
    return file


HISTORY = (
    record(canvas=[[3, 5], [4, None]]),
    record(canvas=[[3, 6], [4, 7]], revised=1),
    record(committed=[[3, 6, 0.9], [4, 7, None]], kind="revise"),
    record(kind="draft", canvas=[[5, 5], [6, 6]]),
    record(kind="verify", accepted=1, committed=[[5, 5, 0.8], [6, 7, 0.2]], rejected=[[6, 6]]),
)


def test_drafts_rejections_and_revisions_are_told_apart(tmp_path):
    forwards = read_trace(written(tmp_path, *HISTORY)).requests[0]
    assert [f.revised for f in forwards] == [[], [[3, 5]], [], [], []]
    assert forwards[4].rejected == [[6, 6]]


def test_the_terminal_shows_signs_and_not_only_colours(tmp_path):
    replay = read_trace(written(tmp_path, *HISTORY))
    lines = [forward_line(replay, i, f).plain for i, f in enumerate(replay.requests[0], 1)]
    assert "[ five░]" in lines[0]
    assert "~1 revised" in lines[1]
    assert "+ six</script>⏎<b>" in lines[2]
    assert "- six" in lines[4]
    assert standing(replay, replay.requests[0][:2]).plain == " six</script>⏎<b>"


def test_no_text_of_a_trace_is_markup_of_the_page(tmp_path):
    text = page(read_trace(written(tmp_path, *HISTORY)), "a<b>.jsonl")
    assert text.count("</script>") == 2  # the data's and the program's own
    assert "<b>" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["texts"]["7"] == "</script>\n<b>"
    assert data["requests"][0]["places"] == 4
    assert not re.search(r'(src|href)="|https?:|@import|url\(', text), "the page must not load anything"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no forwards"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not a record"),
        ('{"request": 0}', "there is no `block`"),
        (json.dumps(record(request=True)), "`request`"),
        (json.dumps(record(committed=[[1, 2]])), "`committed`"),
        (json.dumps(record(committed=[[1, None, 0.5]])), "`committed`"),
        (json.dumps(record(seconds=float("nan"))), "`seconds`"),
        (json.dumps(record(texts={"x": "y"})), "`texts`"),
        (json.dumps(record()) + "\n" + json.dumps(record(canvas=3)), "line 2"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(tmp_path, text, said):
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        read_trace(file)


@pytest.fixture
def trace_file(tmp_path, monkeypatch):
    """A trace of 300 tokens that the command itself wrote."""
    model = tiny_model()
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    file = tmp_path / "trace.jsonl"
    ask = ["generate", "--prompt-ids", "5,6", "--max-new-tokens", "300", "--ignore-eos", "--mode", "self_spec"]
    assert run([*ask, "--trace", str(file), "--no-stats"]) == 0
    return file


def test_the_command_tells_a_trace_in_lines_in_numbers_and_as_a_page(trace_file, tmp_path, capfd):
    capfd.readouterr()
    assert run(["trace", str(trace_file)]) == 0
    assert capfd.readouterr().out.startswith("request 0 · 300 tokens")
    assert run(["trace", str(trace_file), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["requests"][0]
    assert (told["tokens"], told["kinds"]["prefill"]) == (300, 1)
    assert run(["trace", str(trace_file), "--html", str(tmp_path / "t.html")]) == 0
    assert (tmp_path / "t.html").stat().st_size < 400_000


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.slow
def test_a_page_of_300_tokens_opens_in_under_a_second_in_a_browser(trace_file, tmp_path):
    file = tmp_path / "t.html"
    assert run(["trace", str(trace_file), "--html", str(file)]) == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    ended = subprocess.run(
        [BROWSER, *options, "--disable-sync", f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ready = re.search(r'data-ready-ms="(\d+)"', ended.stdout)
    assert ready, "the page's program did not come to its end"
    assert int(ready[1]) < 1000
    assert "300 tokens" in ended.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["trace", "missing.jsonl"],
        ["trace", "."],
        ["trace", "{trace}", "--request", "7"],
        ["trace", "{trace}", "--request", "-1"],
        ["trace", "{trace}", "--speed", "fast"],
        ["trace", "{trace}", "--html", "/nowhere/at/all.html"],
        ["trace", "{trace}", "--html", "x.html", "--json"],
        ["trace"],
        ["generate", "--prompt-ids", "5", "--trace", "/nowhere/at/all.jsonl"],
        ["generate", "--prompt-ids", "5", "--trace", "{other}"],
    ],
    ids=" ".join,
)
def test_careless_commands_are_one_line_and_exit_2(trace_file, tmp_path, capfd, words):
    other = tmp_path / "thesis.txt"
    other.write_text("years of work\n")
    capfd.readouterr()
    assert run([word.format(trace=trace_file, other=other) for word in words]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert other.read_text() == "years of work\n"
