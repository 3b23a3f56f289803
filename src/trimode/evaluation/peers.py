"""Other engines beside ours, on the same weights, prompts and threads: Hugging Face transformers and llama.cpp.

Each is given ids, greedy, and gives ids; what it does between is its own. A peer that cannot run in our dtype says in which numbers it
runs, and its rows are labelled with them: a baseline in other numbers must never pass for the same one.
"""

import io
import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import closing, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimode.checkpoint import open_checkpoint
from trimode.errors import MeasurementError, SettingError, nearest
from trimode.evaluation.benchmark import Setting
from trimode.evaluation.meters import num_threads, resident_bytes
from trimode.evaluation.prompts import BenchPrompt

__all__ = ["PEERS", "LlamaCpp", "LlamaServer", "Transformers", "check_installed", "open_peer"]

PEERS = ("transformers", "llama.cpp")
DTYPES = ("float32", "bfloat16", "float16")
SERVER_START_S = 120


def check_installed(names: Sequence[str]) -> None:
    """Raise SettingError, with the command that installs it, if one of these peers is missing."""
    for written in names:
        name, colon, dtype = written.partition(":")
        if name not in PEERS:
            raise SettingError(f"--peer must be one of {', '.join(PEERS)}; got {written!r}.{nearest(name, PEERS)}")
        if colon and (name != "transformers" or dtype not in DTYPES):
            raise SettingError(
                f"--peer takes a dtype for transformers alone, one of {', '.join(DTYPES)}; got {written!r}."
            )
        if name == "transformers" and (find_spec("transformers") is None or find_spec("accelerate") is None):
            raise SettingError("The peer transformers is not installed. Run `pip install transformers accelerate`.")
        if name == "llama.cpp" and find_spec("llama_cpp") is None and shutil.which("llama-server") is None:
            raise SettingError(
                "The peer llama.cpp is not installed. Run `pip install llama-cpp-python` (it compiles for some minutes), "
                "or put llama.cpp's llama-server on the PATH."
            )


def open_peer(name: str, model: Any, *, longest: int) -> Any:
    """The peer of this name over the weights of `model`. `longest`: tokens of the longest prompt and answer together."""
    name, _, dtype = name.partition(":")
    if name == "transformers":
        return Transformers(model, dtype or str(model.dtype).removeprefix("torch."))
    if find_spec("llama_cpp") is not None:
        return LlamaCpp(model, longest)
    return LlamaServer(model, longest, shutil.which("llama-server") or "llama-server")


def _grown(before: int | None) -> int | None:
    """Memory that was taken since."""
    now = resident_bytes()
    return None if now is None or before is None else now - before


def _record(
    prompt_ids: list[int], new: list[int], ends: set[int], seconds: float, first: float | None
) -> dict[str, Any]:
    """A peer's answer in the words of `Measured`; forwards that it does not tell are None."""
    return {
        "ran_as": "ar",
        "token_ids": new,
        "finish_reason": "stop" if new and new[-1] in ends else "length",
        "prompt_tokens": len(prompt_ids),
        "tokens": len(new),
        "nfe_prefill": None,
        "nfe_decode": None,
        "rounds": 0,
        "round_tokens": 0,
        "accepted": [],
        "revised": 0,
        "seconds": seconds,
        "first_token_seconds": first,
    }


class Transformers:
    """Hugging Face transformers' `generate` over the same file and threads."""

    def __init__(self, model: Any, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        path = Path(open_checkpoint(model.name).path)
        folder, gguf_file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
        logging.set_verbosity_error()
        before = resident_bytes()
        with redirect_stderr(io.StringIO()):  # its bars of progress know no switch
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=getattr(torch, dtype))
        self.model, self.peer = model, loaded.eval().to(model.device)
        sizes: dict[str, int] = {}
        for weight in self.peer.parameters():
            sizes[str(weight.dtype)] = sizes.get(str(weight.dtype), 0) + weight.numel()
        self.dtype = max(sizes, key=sizes.__getitem__).removeprefix("torch.")  # a norm may be wider than the rest
        self.notes: list[str] = []
        self.resident_bytes = _grown(before)
        if self.dtype != dtype:
            raise MeasurementError(f"transformers was asked for {dtype} and runs in {self.dtype}. Leave the peer out.")

    def answer(
        self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int, *, warm_up: bool = False
    ) -> dict[str, Any]:
        import torch

        start = time.perf_counter()
        prompt_ids = self.model.encode(prompt.as_asked())
        ids = torch.tensor([prompt_ids], device=self.model.device)
        ends = list(self.model.config.eos_token_ids)
        streamer = _FirstToken()
        with torch.inference_mode():
            out = self.peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                streamer=streamer,
            )
        new = out[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - start
        return _record(prompt_ids, new, set(ends), seconds, None if streamer.at is None else streamer.at - start)

    def close(self) -> None:
        """Nothing is left open."""


class _FirstToken:
    """Notes when the first token came; what `generate` calls a streamer."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.at: float | None = None

    def put(self, value: Any) -> None:
        self.num_puts += 1
        if self.num_puts == 2:  # the prompt comes first
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def _gguf_of(model: Any) -> tuple[Path, str]:
    """The model's GGUF file and what most of its numbers are. Raises SettingError."""
    checkpoint = open_checkpoint(model.name)
    if checkpoint.path.suffix != ".gguf":
        raise SettingError(
            f"The peer llama.cpp reads GGUF files only, and {model.name} is none. "
            "Convert it with llama.cpp's convert_hf_to_gguf.py and measure that file, or leave the peer out."
        )
    sizes: dict[str, int] = {}
    for tensor in checkpoint.stored.values():
        sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + math.prod(tensor.shape)
    return checkpoint.path, max(sizes, key=sizes.__getitem__).lower()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, over the same file, in a process of its own."""

    def __init__(self, model: Any, longest: int) -> None:
        path, self.dtype = _gguf_of(model)
        self.model = model
        self.notes: list[str] = []
        self._about = {
            "path": str(path),
            "context": longest + 8,
            "threads": num_threads(model),
            "gpu": model.device.type == "cuda",
        }
        try:
            self._start(plain=False)
        except MeasurementError:
            # seen where a virtual machine shows AMX and does not grant it: the weights repacked for it crash
            self._start(plain=True)
            self.notes.append("llama.cpp crashes here with its repacked weights; it runs without them")

    def _start(self, *, plain: bool) -> None:
        """Load, and answer once so that a crash comes now. Raises MeasurementError."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimode.evaluation.llama_worker", json.dumps({**self._about, "plain": plain})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = self._read()
        self.resident_bytes = said["resident_bytes"] or None
        self._ask([0, 0], 2, [])

    def _ask(self, ids: list[int], most: int, ends: list[int]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"ids": ids, "most": most, "ends": ends}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; reading says so
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            _end(self.process)
            raise MeasurementError(f"llama.cpp ended with status {status}. Leave the peer out, or build it anew.")
        return json.loads(line)

    def answer(
        self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int, *, warm_up: bool = False
    ) -> dict[str, Any]:
        start = time.perf_counter()
        prompt_ids = self.model.encode(prompt.as_asked())
        encoding = time.perf_counter() - start  # ours counts it, so theirs does
        ends = list(self.model.config.eos_token_ids)
        told = self._ask(prompt_ids, max_new_tokens, ends)
        first = None if told["first"] is None else encoding + told["first"]
        return _record(prompt_ids, told["ids"], set(ends), encoding + told["seconds"], first)

    def close(self) -> None:
        """End the process."""
        _end(self.process)


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was left to say to one that died
                pipe.close()


class LlamaServer:
    """llama.cpp in a process of its own, `llama-server`, over the same file."""

    def __init__(self, model: Any, longest: int, program: str) -> None:
        path, self.dtype = _gguf_of(model)
        self.model = model
        self.notes: list[str] = []
        self.resident_bytes = None  # another process's memory is not measured
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        threads = str(num_threads(model))
        options = ["-m", str(path), "--host", "127.0.0.1", "--port", str(port), "-c", str(longest + 8), "-np", "1"]
        self.process = subprocess.Popen(
            [program, *options, "-t", threads, "-tb", threads], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + SERVER_START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5) as told:
                    if told.status == 200:
                        return
            except OSError:  # not there yet, or still loading
                time.sleep(0.1)
        self.close()
        raise MeasurementError("llama-server did not start. Run it by hand to see why, or leave the peer out.")

    def answer(
        self, setting: Setting, prompt: BenchPrompt, max_new_tokens: int, seed: int, *, warm_up: bool = False
    ) -> dict[str, Any]:
        start = time.perf_counter()
        prompt_ids = self.model.encode(prompt.as_asked())
        ends = set(self.model.config.eos_token_ids)
        asked = {
            "prompt": prompt_ids,
            "n_predict": max_new_tokens,
            "temperature": 0,
            "top_k": 1,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{self.address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        new: list[int] = []
        first = None
        with urllib.request.urlopen(request, timeout=600) as told:
            for line in told:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                new += event.get("tokens") or []
                if new and first is None:
                    first = time.perf_counter() - start
        if not new:
            raise MeasurementError("llama-server returned no tokens. A version of 2025 or later does; update it.")
        return _record(prompt_ids, new[:max_new_tokens], ends, time.perf_counter() - start, first)

    def close(self) -> None:
        """End the process."""
        _end(self.process)
