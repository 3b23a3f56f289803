"""`trimode generate`: where its output goes, and what it passes on."""

import gc
import io
import json
import sys
from contextlib import nullcontext

import pytest

import trimode
from trimode.cli import screen
from trimode.errors import CheckpointError

TEXT = "The sky scatters blue light.\nThat is all."


def test_the_answer_goes_to_stdout_and_the_statistics_to_stderr(cli, model):
    ended = cli("generate", "Why?")
    assert (ended.status, ended.stdout) == (0, TEXT + "\n")
    assert ended.stderr == "ar · 10 tokens · 0.50 s · 20.0 tokens/s · 1 + 4 forwards · 2.50 tokens/forward\n"


def test_no_stats_leaves_stderr_empty(cli, model):
    assert cli("generate", "Why?", "--no-stats").stderr == ""


def test_an_answer_cut_at_the_limit_says_so(cli, model):
    ended = cli("generate", "Why?", "--max-new-tokens", "2")
    assert ended.stdout == "The sky\n"
    assert ended.stderr.endswith("cut at the limit\n")


def test_only_knobs_that_were_given_are_passed_on(cli, model):
    cli("generate", "Why?", "--mode", "self-spec", "--seed", "3", "--temperature", "0", "--stop", "a", "--stop", "b")
    cli("generate", "Why?", "--no-draft-lora", "--ignore-eos", "--raw")
    cli("generate", "Why?")
    assert model.asked == [
        ("Why?", False, {"mode": "self_spec", "seed": 3, "temperature": 0.0, "stop": ["a", "b"]}),
        ("Why?", True, {"draft_lora": False, "ignore_eos": True}),
        ("Why?", False, {}),
    ]


def test_how_to_load_is_passed_on(cli, model):
    cli("generate", "x", "--model", "m", "--dtype", "bfloat16", "--device", "cpu", "--threads", "2")
    cli("generate", "x", "--model", "m", "--quantize", "none")
    cli("generate", "x")
    nothing = {"dtype": None, "device": None, "threads": None, "quantize": None}
    assert model.loads == [
        ("m", {**nothing, "dtype": "bfloat16", "device": "cpu", "threads": 2}),
        ("m", {**nothing, "quantize": "none"}),
        ("smollm2-135m", nothing),
    ]


def test_json_prints_one_object_and_nothing_else(cli, model):
    ended = cli("generate", "Why?", "--json", "--mode", "self_spec")
    record = json.loads(ended.stdout)
    assert ended.stderr == ""
    assert list(record) == ["text", "token_ids", "finish_reason", "stats"]
    assert (record["text"], record["finish_reason"]) == (TEXT, "stop")
    assert record["stats"]["acceptance_length"] == 2.5


def test_json_writes_null_for_numbers_that_json_cannot_say(cli, model, monkeypatch):
    from tests.cli import fake_model

    monkeypatch.setattr(
        fake_model.Stats, "as_dict", lambda self: {"decode_tpf": float("nan"), "e2e_tpf": [float("inf")]}
    )
    assert json.loads(cli("generate", "x", "--json").stdout)["stats"] == {"decode_tpf": None, "e2e_tpf": [None]}


def test_a_system_message_stands_before_the_prompt(cli, model):
    cli("generate", "Why?", "--system", "Be brief.")
    [(prompt, _, _)] = model.asked
    assert prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def test_a_dash_reads_standard_input_without_the_last_line_break(cli, model, type_in):
    type_in("Why", "so?")
    assert cli("generate", "-").status == 0
    assert model.asked[0][0] == "Why\nso?"


def test_a_raw_prompt_from_standard_input_is_kept_to_the_letter(cli, model, type_in):
    type_in("def f():")
    cli("generate", "-", "--raw")
    assert model.asked[0][0] == "def f():\n"


def test_ids_in_and_ids_out_without_a_tokenizer(cli, use_model):
    model = use_model(tokenizer=False)
    ended = cli("generate", "--prompt-ids", "1, 2,3", "--max-new-tokens", "3")
    assert model.asked[0][0] == [1, 2, 3]
    assert ended.stdout == "10,11,12\n"


def test_ctrl_c_keeps_the_partial_text_and_exits_with_130(cli, use_model):
    use_model(interrupt_after=4)
    ended = cli("generate", "Why?")
    assert (ended.status, ended.stdout, ended.stderr) == (130, "The sky scatters blue\n", "")


def test_an_error_of_the_library_is_one_line(cli, model):
    ended = cli("generate", "refuse me")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == "trimode: This prompt is refused. Ask another.\n"


def test_a_bug_keeps_its_traceback(cli, model):
    model.stream = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli("generate", "Why?")


def test_a_terminal_is_not_sent_the_models_control_characters(cli, use_model, monkeypatch):
    use_model(answer=["a\x1b[2J", "b\n"])
    assert cli("generate", "x", "--no-stats").stdout == "a\x1b[2Jb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli("generate", "x", "--no-stats").stdout == "a\N{REPLACEMENT CHARACTER}[2Jb\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "There is no prompt. Give a text, - to read standard input, or --prompt-ids."),
        ([""], "The prompt is empty. Give some text."),
        (["a", "--prompt-ids", "1"], "A prompt and --prompt-ids are two prompts. Give one of them."),
        (["--prompt-ids", "1,x"], "--prompt-ids must be whole numbers with commas, such as 1,2,3; got '1,x'."),
        (["--prompt-ids", ""], "--prompt-ids must be whole numbers with commas, such as 1,2,3; got ''."),
        (["--prompt-ids", "-1"], "--prompt-ids must be whole numbers with commas, such as 1,2,3; got '-1'."),
        (["--prompt-ids", "1", "--raw"], "--raw has no effect on --prompt-ids: ids are taken as they stand."),
        (["a", "--raw", "--system", "b"], "--system has no effect with --raw"),
        (["a", "--json", "--canvas"], "--canvas has no effect with --json."),
        (["a", "--json", "--no-stats"], "--json always tells the statistics."),
        (["a", "--canvas"], "The canvas needs a terminal"),
        (["\udcff"], "The prompt is not UTF-8 text."),
        (
            ["a", "--mode", "difusion"],
            "mode must be one of auto, ar, diffusion, self_spec; got 'difusion'. Did you mean 'diffusion'?",
        ),
        (["a", "--unmasking", "x"], "unmasking must be one of threshold, fixed,"),
        (["a", "--self-spec-kind", "qadratic"], "Did you mean 'quadratic'?"),
        (["a", "--max-new-tokens", "0"], "max_new_tokens must be a whole number from 1"),
        (["a", "--max-new-tokens", "-5"], "max_new_tokens must be a whole number from 1"),
        (["a", "--max-new-tokens", "many"], "--max-new-tokens must be a whole number; got 'many'."),
        (["a", "--max-new-tokens", "1.5"], "--max-new-tokens must be a whole number; got '1.5'."),
        (["a", "--block-length", "-1"], "block_length must be a whole number from 1"),
        (["a", "--threshold", "1.5"], "threshold must be a number from 0 to 1; got 1.5."),
        (["a", "--threshold", "nan"], "threshold must be a number from 0 to 1; got nan."),
        (["a", "--temperature", "-1"], "temperature must be a number from 0 to 100; got -1.0."),
        (["a", "--temperature", "inf"], "temperature must be a number from 0 to 100; got inf."),
        (["a", "--threshold", "0.5", "--mode", "ar"], "threshold has no effect in mode 'ar'"),
        (["a", "--canvas", "--mode", "ar"], "--canvas has no effect in mode ar"),
        (["a", "--top-p", "0.5"], "top_p has no effect at temperature 0."),
        (["a", "--threads", "0"], "--threads must be 1 or more; got 0."),
        (["a", "--stop", ""], "stop must be one or more non-empty strings"),
        (["a", "--tresh", "1"], "No such option: --tresh. Did you mean '--threshold'? See 'trimode generate --help'."),
        (["a", "--seed"], "Option '--seed' requires an argument."),
        (["a", "b"], "Got unexpected extra argument"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_loaded(cli, no_model, arguments, told):
    ended = cli("generate", *arguments)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("trimode: ")
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (None, "Standard input is closed"),
        (io.StringIO(""), "Standard input is empty."),
        (io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"), "Standard input is not UTF-8 text."),
    ],
    ids=["closed", "empty", "bytes"],
)
def test_standard_input_without_a_prompt_is_told(cli, no_model, monkeypatch, stdin, told):
    monkeypatch.setattr(sys, "stdin", stdin)
    ended = cli("generate", "-")
    assert (ended.status, ended.stdout) == (2, "")
    assert told in ended.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_looked_for_while_a_model_loads_and_afterwards_it_is(model, monkeypatch, fails):
    seen = []

    def load(name, **arguments):
        seen.append(gc.isenabled())
        if fails:
            raise CheckpointError("no")
        return model

    monkeypatch.setitem(vars(trimode), "load", load)
    before = gc.get_freeze_count()
    try:
        with pytest.raises(CheckpointError) if fails else nullcontext():
            screen.load("x", dtype=None, device=None, threads=None)
        assert seen == [False]
        assert gc.isenabled()
        assert (gc.get_freeze_count() > before) is not fails
    finally:
        gc.unfreeze()
