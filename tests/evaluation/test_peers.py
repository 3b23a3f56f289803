"""Peers run the same weights and prompts; one that is missing, crashes or computes in other numbers never goes unnoticed."""

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trimode.cli.app import run
from trimode.errors import MeasurementError, SettingError
from trimode.evaluation import peers
from trimode.evaluation.benchmark import Setting
from trimode.evaluation.prompts import BenchPrompt

ASK = BenchPrompt(prompt=(5, 6, 7))
AR = Setting(mode="ar")
LLAMA = """
import os, signal
from . import llama_cpp
__version__ = "0"

class Llama:
    def __init__(self, **arguments):
        self.repacked = llama_cpp.llama_model_default_params().use_extra_bufts

    def reset(self):
        pass

    def generate(self, ids, **_):
        if self.repacked and {crashes}:
            os.kill(os.getpid(), signal.SIGSEGV)
        print("a remark of the library")
        last = ids[-1]
        while True:
            last += 1
            yield last
"""
PARAMETERS = """
class _Parameters:
    use_extra_bufts = True

def llama_model_default_params():
    return _Parameters()
"""
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        for i in range(asked["n_predict"]):
            event = {{"tokens": [asked["prompt"][-1] + 1 + i], "stop": False}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def model():
    """What a peer asks of ours; the file is the embedded model's."""
    return SimpleNamespace(
        name="smollm2-135m",
        device=torch.device("cpu"),
        config=SimpleNamespace(eos_token_ids=(10,)),
        encode=list,
    )


def install(monkeypatch, folder, *, crashes):
    package = folder / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(LLAMA.format(crashes=crashes)))
    (package / "llama_cpp.py").write_text(PARAMETERS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)


@pytest.mark.parametrize("crashes", [False, True], ids=["sound", "crashes when repacked"])
def test_llama_cpp_answers_from_its_own_process_and_survives_its_crash(model, monkeypatch, tmp_path, crashes):
    install(monkeypatch, tmp_path, crashes=crashes)
    peer = peers.open_peer("llama.cpp", model, longest=64)
    try:
        answer = peer.answer(AR, ASK, 2, 0)
        assert (answer["token_ids"], answer["finish_reason"], answer["tokens"]) == ([8, 9], "length", 2)
        answer = peer.answer(AR, ASK, 9, 0)
        assert (answer["token_ids"], answer["finish_reason"]) == ([8, 9, 10], "stop")
        assert 0 < answer["first_token_seconds"] <= answer["seconds"]
        assert peer.dtype == "q4_1"
        assert bool(peer.notes) == crashes
    finally:
        peer.close()
    assert peer.process.poll() is not None


def test_llama_cpp_that_never_runs_is_one_clear_error(model, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, crashes=True)
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('no such processor')")
    with pytest.raises(MeasurementError, match=r"llama\.cpp ended"):
        peers.open_peer("llama.cpp", model, longest=64)


def test_the_server_of_llama_cpp_does_where_python_has_none(model, monkeypatch, tmp_path):
    program = tmp_path / "llama-server"
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    peers.check_installed(["llama.cpp"])
    peer = peers.open_peer("llama.cpp", model, longest=64)
    try:
        answer = peer.answer(AR, ASK, 3, 0)
        assert (answer["token_ids"], answer["finish_reason"]) == ([8, 9, 10], "stop")
    finally:
        peer.close()
    assert peer.process.poll() is not None


@pytest.mark.parametrize(
    ("name", "remedy"), [("transformers", "pip install transformers"), ("llama.cpp", "llama-cpp-python")]
)
def test_a_peer_that_is_not_installed_is_told_with_its_command(monkeypatch, name, remedy):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingError, match=remedy):
        peers.check_installed([name])


def test_llama_cpp_reads_only_gguf_files(model, tmp_path):
    from tests.worlds import random_transformer, tiny_config
    from trimode.checkpoint import save_checkpoint

    config = tiny_config()
    save_checkpoint(tmp_path / "tiny", config, random_transformer(config).dense_tensors())
    model.name = str(tmp_path / "tiny")
    with pytest.raises(SettingError, match="GGUF"):
        peers.LlamaCpp(model, 8)


@pytest.mark.slow
def test_transformers_runs_the_same_weights_so_that_in_float32_it_says_what_ar_says(tmp_path, capfd):
    out: Path = tmp_path / "out"
    small = ["--limit", "2", "--max-new-tokens", "12", "--rounds", "1", "--modes", "ar", "--dtype", "float32"]
    assert run(["bench", "smollm2-135m", *small, "--peer", "transformers", "-o", str(out)]) == 0
    rows = {row["label"]: row for row in json.loads((out / "bench.json").read_text())["results"]}
    assert rows["transformers"]["agreement_with_ar"]["share_equal"] == 1
    assert rows["transformers"]["first_token_seconds"]["median"] > 0
