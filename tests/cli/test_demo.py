"""`trimode demo`: every mode once, a table, and whether self_spec kept its promise."""

import json

import pytest


def test_every_mode_answers_under_its_heading_and_a_table_closes(cli, model):
    ended = cli("demo")
    assert (ended.status, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    headings = [line for line in lines if line.startswith("──") and "mode" not in line]
    assert [heading.strip("─ ") for heading in headings if heading.strip("─ ")] == [
        "ar",
        "diffusion",
        "self_spec",
        "auto",
    ]
    assert ended.stdout.count("That is all.") == 4
    assert "tokens/forward" in ended.stdout
    assert "forwards: those that read the prompt" in ended.stdout
    assert lines[-1] == "self_spec's text and auto's equal ar's, token for token."


def test_a_notice_is_told_once(cli, model):
    assert cli("demo").stdout.count("drafts are poor") == 1


@pytest.mark.parametrize("mode", ["self_spec", "auto"])
def test_a_difference_is_not_hidden(cli, use_model, mode):
    use_model(differs=mode)
    assert (
        cli("demo").stdout.splitlines()[-1].startswith("The text of self_spec or auto differs from ar's. In float32 on")
    )


def test_rounding_is_named_only_where_rows_share_it(cli, use_model):
    model = use_model(differs="self_spec")
    model.precision, model.rows_stand_alone = "bfloat16", False
    assert "may tie within rounding" in cli("demo").stdout.splitlines()[-1]


def test_a_checkpoint_without_a_mask_answers_in_the_modes_that_it_has(cli, use_model):
    use_model(mask=None)
    ended = cli("demo")
    assert ended.status == 0
    assert "names no mask token" in ended.stderr
    assert ended.stdout.splitlines()[-1] == "auto's text equals ar's, token for token."
    assert [run["mode"] for run in json.loads(cli("demo", "--json").stdout)["runs"]] == ["ar", "auto"]


def test_auto_that_was_tuned_to_diffusion_is_no_bug(cli, use_model):
    use_model(differs="auto", auto={"mode": "diffusion"})
    assert cli("demo").stdout.splitlines()[-2:] == [
        "self_spec's text equals ar's, token for token.",
        "auto was tuned to diffusion here, whose text may be another.",
    ]


def test_json_tells_the_same(cli, model):
    record = json.loads(cli("demo", "--json", "--prompt", "Hm?", "--max-new-tokens", "4").stdout)
    assert [run["mode"] for run in record["runs"]] == ["ar", "diffusion", "self_spec", "auto"]
    assert [len(run["token_ids"]) for run in record["runs"]] == [4, 4, 4, 4]
    assert (record["self_spec_equals_ar"], record["auto_equals_ar"], record["prompt"]) == (True, True, "Hm?")


def test_mistakes_are_one_line(cli, no_model):
    for arguments in (["--max-new-tokens", "-1"], ["--prompt", ""], ["--threads", "two"], ["--promt", "x"]):
        ended = cli("demo", *arguments)
        assert (ended.status, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)


def test_ctrl_c_ends_the_demo(cli, use_model):
    use_model(interrupt_after=2)
    ended = cli("demo")
    assert ended.status == 130
    assert ended.stdout.endswith("The sky\n")
