"""`trimode info`: a page for people, JSON for programs, from headers alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimode import device
from trimode.cli import info as info_command
from trimode.device import native_kernels
from trimode.errors import CheckpointNotFoundError
from trimode.model.native import NativeForward

FACTS = {
    "name": "smollm2-135m",
    "path": "/models/smollm2.gguf",
    "family": "llama",
    "parameters": 134_515_008,
    "dtype": "Q4_1",
    "weight_bytes": 98_223_104,
    "layers": 30,
    "width": 576,
    "heads": 9,
    "vocab_size": 49_152,
    "context": 8192,
    "mask_token_id": 3,
    "block_length": 32,
    "block_predicts": "self",
    "modes": ["ar", "diffusion", "self_spec"],
    "trained_for_blocks": False,
    "adapter": None,
    "ngram_contexts": 0,
    "memory_bytes": {"float32": 600_000_000, "bfloat16": 300_000_000},
}


@pytest.fixture
def describe(monkeypatch):
    facts = dict(FACTS)

    def open_checkpoint(name):
        if name == "missing":
            raise CheckpointNotFoundError("Nothing lies at 'missing'. Give a preset, a directory or a GGUF file.")
        return name

    module = SimpleNamespace(open_checkpoint=open_checkpoint, describe=lambda checkpoint: facts)
    monkeypatch.setitem(sys.modules, "trimode.checkpoint", module)
    monkeypatch.setattr(info_command, "native_kernels", lambda: ["avx2", "portable"])
    monkeypatch.setattr(info_command, "memory_bytes", lambda: 500_000_000)
    monkeypatch.setattr(info_command, "available_bytes", lambda: 400_000_000)
    return facts


def test_the_page_tells_sizes_modes_and_what_would_run_here(cli, describe):
    ended = cli("info", "smollm2-135m")
    assert (ended.status, ended.stderr) == (0, "")
    for told in ("134,515,008", "98.2 MB, Q4_1", "30 layers", "8,192 tokens", "ar, diffusion, self_spec"):
        assert told in ended.stdout
    rows = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert "memory 600 MB in float32 does not fit here" in rows
    assert "300 MB in bfloat16 runs here" in rows
    assert "here 500 MB of memory, 400 MB of it free" in rows


def test_what_is_told_stands_in_one_column(cli, describe):
    describe["memory_bytes"] = {"float32": 1_200_000_000, "bfloat16": 600_000_000}
    _, *rows = cli("info", "smollm2-135m").stdout.splitlines()
    begins = {len(row) - len(row[12:].lstrip()) for row in rows if "600 MB" not in row}
    assert begins == {12}
    sizes = [row.index(" in ") for row in rows if "B in " in row]
    assert len(sizes) == 2
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("stored", "kernels", "told"),
    [
        ("Q4_1", ["avx2"], "in int8 by the native engine (avx2); --quantize none computes in float32: slower"),
        ("bfloat16", ["avx2"], "in int8 by the native engine (avx2); --quantize none computes in bfloat16: slower"),
        ("float32", ["avx2"], "in float32 by the native engine (avx2); --quantize int8 is faster"),
        ("float16", ["avx2"], "in float16 by PyTorch; --quantize int8 is faster, by the native engine."),
        ("bfloat16", [], "in bfloat16 by PyTorch; no native engine: it was not built, for want of a C++ compiler"),
        ("Q4_1", [], "in float32 by PyTorch; no native engine"),
    ],
)
def test_the_page_tells_which_engine_runs_it_and_why(cli, describe, monkeypatch, stored, kernels, told):
    describe.update(dtype=stored)
    monkeypatch.setattr(info_command, "native_kernels", lambda: kernels)
    assert told in " ".join(cli("info", "x").stdout.split())


def test_what_the_page_says_of_the_engine_is_what_load_does():
    import trimode

    path = Path(__file__).parents[1] / "golden" / "nld_tiny"
    told = info_command.engine_on_the_cpu("float32", native_kernels())
    model = trimode.load(path, device="cpu")
    assert model.precision == told["precision"]
    assert isinstance(model.forward, NativeForward) is (told["name"] == "native")


def test_info_imports_no_torch():
    code = "import sys; from trimode.cli.app import run; run(['info', sys.argv[1]]); assert 'torch' not in sys.modules"
    path = Path(__file__).parents[1] / "golden" / "nld_tiny"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)


def test_json_is_the_description_and_the_verdict(cli, describe):
    record = json.loads(cli("info", "smollm2-135m", "--json").stdout)
    assert record["parameters"] == 134_515_008
    assert record["runs_here"] == {"float32": "does not fit here", "bfloat16": "runs here"}


def test_a_checkpoint_without_a_mask_token_says_that_it_has_no_blocks(cli, describe):
    describe.update(mask_token_id=None, modes=["ar"], block_length=None, block_predicts=None)
    assert "names no mask token" in cli("info", "x").stdout


def test_an_adapter_is_told_by_its_size_and_place(cli, describe):
    describe.update(adapter={"rank": 64, "parts": ["o_proj"], "parameters": 1_234_567}, trained_for_blocks=True)
    rows = [" ".join(line.split()) for line in cli("info", "x").stdout.splitlines()]
    assert "adapter rank 64 · 1,234,567 parameters · o_proj" in rows
    assert "n-grams none" in rows
    assert "trained yes" in rows
    describe.update(ngram_contexts=323_956)
    assert "323,956 contexts" in cli("info", "x").stdout


def test_a_missing_path_is_one_line(cli, describe):
    ended = cli("info", "missing")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == "trimode: Nothing lies at 'missing'. Give a preset, a directory or a GGUF file.\n"


@pytest.mark.parametrize(
    ("needed", "memory", "free", "told"),
    [
        (5, 10, 6, "runs here"),
        (8, 10, 6, "would run here with more memory free"),
        (11, 10, 6, "does not fit here"),
        (8, 10, None, "runs here"),
        (8, None, None, ""),
    ],
)
def test_the_verdict(needed, memory, free, told):
    assert info_command.verdict(needed, memory_bytes=memory, available_bytes=free) == told


def test_this_machine_has_memory_and_some_of_it_is_free():
    has, free = device.memory_bytes(), device.available_bytes()
    assert has is None or has > 0
    assert free is None or has is None or 0 <= free <= has
