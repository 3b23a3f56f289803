"""`trimode distill`: what it says when there is little or nothing to do."""

import json
import os
import signal

import pytest


@pytest.fixture
def answering(model):
    """The fake model, for batches of ids; a prompt with "long" in it is over the limit."""
    alone = model.generate
    model.encode = lambda prompt: [1] * (9 if "long" in prompt else 2)
    model.generate = lambda batch, **knobs: [alone("", **knobs) for _ in batch]
    return model


def prompts(tmp_path, *texts):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(file)


def test_a_finished_run_says_that_all_is_answered(cli, answering, tmp_path):
    command = ["distill", prompts(tmp_path, "a", "b", "c"), "--output", str(tmp_path / "out.jsonl")]
    assert "3 answers" in cli(*command).stderr
    again = cli(*command)
    assert again.status == 0
    assert "3 prompts are answered already and none are left" in again.stderr
    assert "0 answers" not in again.stderr
    assert "3/3" in again.stderr  # the bar
    assert "0/3" not in again.stderr
    assert json.loads(cli(*command, "--json").stdout)["answered_before"] == 3


def test_what_cannot_be_answered_is_not_called_answered(cli, answering, tmp_path):
    out = ["--output", str(tmp_path / "out.jsonl"), "--max-prompt-tokens", "4"]
    command = ["distill", prompts(tmp_path, "a", "long", "c"), *out]
    assert "2 answers" in cli(*command).stderr
    assert "2 prompts are answered already and none are left; 1 skipped" in cli(*command).stderr
    assert "0 answers" in cli("distill", prompts(tmp_path, "long"), *out[:1], str(tmp_path / "new"), *out[2:]).stderr


def test_a_bad_line_is_refused_with_the_option_that_leaves_it_out(cli, answering, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for bad in ("{", '{"question": "a"}'):
        file.write_text('{"prompt": "a"}\n' + bad + "\n")
        command = ["distill", str(file), "--output", str(tmp_path / "out.jsonl")]
        refused = cli(*command)
        assert refused.status == 2
        assert "Line 2" in refused.stderr
        assert "--bad-lines skip" in refused.stderr
        assert "1 skipped" in cli(*command, "--bad-lines", "skip").stderr


def test_one_that_is_stopped_says_how_to_go_on(cli, answering, tmp_path, monkeypatch):
    def stopped(*args, **knobs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(answering, "generate", stopped)
    ended = cli("distill", prompts(tmp_path, "a"), "--output", str(tmp_path / "out.jsonl"))
    assert ended.status == 130
    assert "out.jsonl. The same command continues." in " ".join(ended.stderr.split())
