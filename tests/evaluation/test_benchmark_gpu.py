"""`benchmarks/gpu.py` runs from end to end where there is no GPU and its figures mean nothing, and refuses what it cannot do."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SMALL = ("--shape", "tiny", "--batch", "1,2", "--context", "0,40", "--length", "1,4", "--rounds", "1")


@pytest.fixture
def run(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_tiny_shape_runs_through_every_table(quantize, run):
    report = json.loads(run(*SMALL, "--json", "--quantize", quantize))
    tiny = report["shapes"]["tiny"]
    assert [(r["batch"], r["context"], r["length"]) for r in tiny["forwards"]] == [
        (b, c, t) for b in (1, 2) for c in (0, 40) for t in (1, 4)
    ]
    for row in tiny["forwards"]:
        assert row["is_captured"]
        assert all(row[name]["ms"] > 0 for name in ("eager", "captured", "draft", "adapted_draft"))
        assert ("memory" in row) == (row["batch"] == row["length"] == 1)
    assert {kernel for row in tiny["kernels"] for kernel in row} == {"context", "length", "plain", "sdpa"}
    assert all(r["ar_loop_tokens_per_second"] > 0 for r in tiny["decoding"])


def test_the_table_says_what_was_assumed(run):
    text = run(*SMALL)
    assert "acceptance assumed, not measured" in text
    if not torch.cuda.is_available():
        assert "figures mean nothing" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        pytest.param(
            (),
            "No CUDA device was found",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device"),
        ),
        (("--shape", "70b"), "There is no shape '70b'"),
        (("--shape", "tiny", "--batch", "0"), "at least 1"),
        (("--shape", "tiny", "--rounds", "0"), "--rounds must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, why, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert why in told
    assert len(told.splitlines()) == 1
