"""`trimode eval` and `trimode sol` keep every sample, go on where they were stopped, and tell their errors rightly."""

import json
import math
import os
import signal

import pytest

import trimode
from tests.evaluation.speaking import speaking_model
from trimode.cli.app import run
from trimode.errors import DataError
from trimode.evaluation.evaluate import mean, summarise_eval
from trimode.evaluation.run_folder import RunFolder


@pytest.fixture
def model(monkeypatch):
    model = speaking_model(max_positions=2048)
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    return model


def sample(task, setting, id, score, answer="a", **cost):
    costs = {"mode": setting, "tokens": 6, "nfe_prefill": 1, "nfe_decode": 5, "seconds": 2.0, **cost}
    return {
        "task": task, "setting": setting, "id": id, "prompt": "p", "answer": answer, "score": score, "parts": {},
        "note": "", "finish_reason": "stop", "cost": costs,
    }  # fmt: skip


def test_figures_have_their_standard_errors_and_differences_are_paired():
    scores = {"ar": [1, 1, 0, 0], "diffusion": [1, 0, 0, 0]}
    samples = [sample("t", s, str(i), float(x)) for s, xs in scores.items() for i, x in enumerate(xs)]
    ar, diffusion = summarise_eval(samples)
    assert ar["setting"] == "ar"
    assert ar["score"] == {"value": 0.5, "standard_error": pytest.approx(math.sqrt(1 / 3 / 4))}
    assert ar["minus_ar"] is None
    # differences 0, -1, 0, 0: their mean and error, far smaller than that of two independent shares
    assert diffusion["minus_ar"] == {"value": -0.25, "standard_error": pytest.approx(0.25)}
    assert diffusion["decode_tpf"] == {"value": 1.2, "standard_error": 0.0}
    assert diffusion["tokens_per_second"]["value"] == 3.0
    assert mean([1.0]) == {"value": 1.0, "standard_error": None}


def test_every_sample_is_kept_and_a_stopped_run_goes_on(tmp_path, model, monkeypatch, capfd):
    folder = tmp_path / "out"
    command = [
        "eval",
        "tiny",
        "--tasks",
        "copy,count",
        "--limit",
        "2",
        "--modes",
        "ar,self_spec,diffusion:threshold=0.5",
    ]
    command += ["--max-new-tokens", "6", "-o", str(folder)]
    whole, calls = model.generate, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "generate", stopped)
    assert run(command) == 130
    assert json.loads((folder / "eval.json").read_text())["partial"] is True
    assert "5 of 12 are kept" in capfd.readouterr().err
    assert run(command) == 2
    assert "--resume" in capfd.readouterr().err
    # a run that was killed while it wrote
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"task": "co')
    assert run([*command, "--resume"]) == 0
    assert len(calls) == 6 + 7
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len({(s["task"], s["setting"], s["id"]) for s in samples}) == len(samples) == 12
    for one in samples:
        assert one["prompt"].startswith(("Repeat", "Count"))
        assert one["cost"]["tokens"] <= 6
        assert {"answer", "score", "note", "finish_reason", "shots"} <= one.keys()
    report = json.loads((folder / "eval.json").read_text())
    assert report["partial"] is False
    assert [(r["task"], r["setting"], r["n"]) for r in report["results"][:3]] == [
        ("copy", "ar", 2), ("copy", "self_spec", 2), ("copy", "diffusion:threshold=0.5", 2),
    ]  # fmt: skip
    assert report["results"][1]["same_answer_as_ar"]["value"] == 1
    out = capfd.readouterr().out
    assert "±" in out
    assert max(map(len, out.splitlines())) <= 100
    assert run([*command, "--resume", "--seed", "3"]) == 2
    assert "another" in capfd.readouterr().err


def test_a_scheduler_that_ends_the_run_loses_nothing(tmp_path, model, monkeypatch):
    whole, calls = model.generate, []

    def ended(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "generate", ended)
    before = signal.getsignal(signal.SIGTERM)
    command = ["eval", "tiny", "--tasks", "copy", "--limit", "4", "--modes", "ar", "-o", str(tmp_path / "o")]
    assert run(command) == 130
    report = json.loads((tmp_path / "o" / "eval.json").read_text())
    assert (report["partial"], report["results"][0]["n"]) == (True, 2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_example_that_does_not_fit_is_a_wrong_answer(tmp_path, model, monkeypatch):
    model.config = model.transformer.config = type(model.config)(
        **{f: getattr(model.config, f) for f in model.config.__dataclass_fields__} | {"max_positions": 100}
    )
    command = ["eval", "tiny", "--tasks", "copy", "--limit", "1", "--modes", "ar", "-o", str(tmp_path / "o")]
    assert run(command) == 0
    (one,) = [json.loads(line) for line in (tmp_path / "o" / "samples.jsonl").read_text().splitlines()]
    assert (one["score"], one["finish_reason"], one["cost"]) == (0.0, "too long", None)


def test_the_speed_of_light_command_goes_on_where_it_was_stopped(tmp_path, model, monkeypatch, capfd):
    from trimode.evaluation import speed_of_light

    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "abc", "category": "x"}\n{"prompt": "xyz", "category": "x"}\n{"prompt": "q1", "category": "y"}\n'
    )
    folder = tmp_path / "sol"
    command = ["sol", "tiny", "--prompts", str(file), "--per-category", "1", "--block-lengths", "2,4"]
    command += ["--max-new-tokens", "8", "--budget", "30", "-o", str(folder)]
    whole, calls = speed_of_light.speculation_light, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(speed_of_light, "speculation_light", stopped)
    assert run(command) == 130
    assert run([*command, "--resume"]) == 0
    report = json.loads((folder / "sol.json").read_text())
    assert (report["partial"], len(report["records"])) == (False, 8)
    rows = {(r["block_length"], r["category"]): r for r in report["results"]}
    assert set(rows) == {(n, c) for n in (2, 4) for c in ("all", "x", "y")}
    assert rows[4, "all"]["prompts"] == 2
    out = capfd.readouterr().out
    assert "ideal" in out
    assert max(map(len, out.splitlines())) <= 100


def test_texts_are_scored_under_both_views(tmp_path, model, capfd):
    from trimode.evaluation.likelihood import autoregressive_score, diffusion_score

    file = tmp_path / "texts.jsonl"
    lines = [
        {"text": "a cat sat."},
        {"id": "7", "setting": "ar", "prompt": "who?", "answer": "me and you"},
        {"id": "7", "setting": "diffusion", "prompt": "who?", "answer": ""},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert run(["eval", "tiny", "--likelihood", str(file), "--samples", "3", "-o", str(tmp_path / "l")]) == 0
    report = json.loads((tmp_path / "l" / "likelihood.json").read_text())
    assert report["left_out"] == 1
    texts, ar = report["results"]
    ids = model.tokenizer.encode("a cat sat.")
    assert texts["ar_per_token"]["value"] == pytest.approx(model.score(ids) / (len(ids) - 1), rel=1e-5)
    context, target = (model.tokenizer.encode(t) for t in ("who?\n", "me and you"))
    assert ar["ar_per_token"]["value"] == pytest.approx(
        autoregressive_score(model, context, target).total / 10, rel=1e-5
    )
    bound = diffusion_score(model, context, target, samples=3)
    assert ar["bound_per_token"]["value"] == pytest.approx(bound.total / 10, rel=1e-5)
    assert ar["bound_draw_error"] == pytest.approx(bound.standard_error / 10)
    out = capfd.readouterr()
    assert "1 of 3 texts are left out" in out.err
    assert max(map(len, out.out.splitlines())) <= 100


def test_a_checkpoint_without_a_mask_is_graded_in_the_modes_that_it_has(tmp_path, monkeypatch, capfd):
    bare = speaking_model(max_positions=2048, mask_token_id=None)
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: bare)
    command = ["eval", "bare", "--tasks", "copy", "--limit", "1", "--max-new-tokens", "4", "-o", str(tmp_path / "out")]
    assert run(command) == 0
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert report["settings"] == ["ar", "auto"]
    assert "names no mask token" in capfd.readouterr().err
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a cat sat."}')
    assert run(["eval", "bare", "--likelihood", str(file), "-o", str(tmp_path / "l")]) == 2
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval tiny --tasks nothing", "no task 'nothing'"),
        ("eval tiny --tasks gsm8k", "needs its file"),
        ("eval tiny --tasks gsm8k=/nowhere.jsonl", "no file /nowhere.jsonl"),
        ("eval tiny --modes", "requires an argument"),
        ("eval tiny --modes ,", "names no mode"),
        ("eval tiny --modes ar,ar", "twice"),
        ("eval tiny --modes fast", "mode must be one of"),
        ("eval tiny --modes ar:threshold=0.5", "threshold"),
        ("eval tiny --modes diffusion:threshold", "name=value"),
        ("eval tiny --modes diffusion:seed=3", "same for all modes"),
        ("eval tiny --limit 0", "--limit must be 1 or more"),
        ("eval tiny --limit many", "whole number"),
        ("eval tiny --trust-code", "no effect"),
        ("eval tiny --variants bfloat16", "no effect"),
        ("eval tiny --samples 3", "no effect"),
        ("eval tiny --likelihood /nowhere", "no file /nowhere"),
        ("eval tiny --likelihood x --samples 1", "--samples must be 2 or more"),
        ("eval tiny --likelihood x --tasks copy", "takes the place"),
        ("eval tiny --quantization-report --variants int3", "Did you mean 'int8'"),
        ("eval tiny --quantization-report --tasks copy", "no effect"),
        ("eval tiny --resume -o /nowhere/at/all", "holds no run"),
        ("sol tiny --modes ar", "--modes takes diffusion and self_spec"),
        ("sol tiny --block-lengths 1,4", "2 or more"),
        ("sol tiny --block-lengths x", "whole number"),
        ("sol tiny --budget 0", "1 or more"),
        ("sol tiny --modes self_spec --threshold 0.5", "leaves diffusion out"),
        ("sol tiny --prompts /nowhere", "no file /nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, model, capfd, command, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command.split()) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_a_run_folder_refuses_what_is_not_its_own(tmp_path):
    run = RunFolder.open(tmp_path / "a", "lines", {"x": 1}, resume=False)
    run.append({"n": 1})
    again = RunFolder.open(tmp_path / "a", "lines", {"x": 1}, resume=True)
    assert again.records == [{"n": 1}]
    with pytest.raises(DataError, match="differs in x"):
        RunFolder.open(tmp_path / "a", "lines", {"x": 2}, resume=True)
    (tmp_path / "a" / "lines.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1"):
        RunFolder.open(tmp_path / "a", "lines", {"x": 1}, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        RunFolder.open(tmp_path / "file", "lines", {}, resume=False)
