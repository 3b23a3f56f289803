"""What rounding costs here and in llama.cpp: int8 and Q8_0 against float32 on the same tokens.

    python -m venv peer && peer/bin/pip install cyllama==0.2.18       # llama.cpp, compiled
    python benchmarks/rounding_beside_llama_cpp.py --peer peer/bin/python [--types q8_0,q4_1,f32] [--threads 2] [--json]

The tokens are those of `trimode eval --quantization-report`, read causally. llama.cpp runs in a process of its own, with its usual
settings: keys and values in halves, as in int8 here. Its weights are made from the embedded model's file by its own quantiser; q4_1 is
that file as it is, whose four bits int8 keeps as well. "int8 of q8_0" is int8 on the weights that llama.cpp made. f32 shows that both
compute the same model. A difference's error is that of the windows' differences.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

FTYPES = {"f32": 0, "f16": 1, "q4_1": None, "q8_0": 7}
"""llama.cpp's numbers of file types; None is the file itself."""
FIGURES = ("agreement", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="A Python that has cyllama.")
    parser.add_argument("--types", default="q8_0,q4_1,f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    import trimode
    from trimode.checkpoint import open_checkpoint
    from trimode.evaluation import quantization
    from trimode.evaluation.evaluate import mean

    reference = trimode.load("smollm2-135m", device="cpu", dtype="float32", threads=options.threads)
    windows = quantization.report_windows(reference)

    def measured(logits: quantization.Logits) -> list[dict[str, Any]]:
        # under this name the report compares the causal view alone
        return [quantization.compare(reference, logits, "llama.cpp", [w])[0] for w in windows]

    path = Path(open_checkpoint("smollm2-135m").path)
    found = {"int8": measured(quantization.load_variant(reference, "int8"))}
    engine = ""
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types.split(","):
            peer = Peer(options.peer, path, name, options.threads, Path(folder))
            found[name], engine = measured(peer.logits), peer.about
            peer.close()
            if name == "q8_0":
                rounded = trimode.load(str(Path(folder) / "q8_0.gguf"), device="cpu", quantize="int8")
                found["int8 of q8_0"] = measured(rounded.logits)
    report = {
        "reference": reference.forward.describe(),
        "llama_cpp": engine,
        "rows": {
            name: {
                "places": sum(row["places"] for row in rows),
                **{key: mean([row[key]["value"] for row in rows]) for key in FIGURES},
                "kl_worst": max(row["kl_worst"] for row in rows),
            }
            for name, rows in found.items()
        },
        "differences": {
            f"{ours} - {theirs}": {
                key: mean([a[key]["value"] - b[key]["value"] for a, b in zip(found[ours], found[theirs], strict=True)])
                for key in FIGURES
            }
            for ours, theirs in (("int8", "q8_0"), ("int8", "q4_1"), ("int8 of q8_0", "q8_0"))
            if theirs in found
        },
    }
    print(json.dumps(report, indent=1) if options.json else as_text(report))


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, path: Path, kind: str, threads: int, folder: Path) -> None:
        told = {"path": str(path), "kind": kind, "threads": threads, "folder": str(folder)}
        self._process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(told)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asked, self._answers = self._process.stdin, self._process.stdout
        first = self._answers.readline()
        if not first:
            sys.exit("llama.cpp does not start. Name a Python that has it: --peer (pip install cyllama)")
        self.about, self._vocab_size = json.loads(first)

    def logits(self, ids: list[int], **_: Any) -> Any:
        import torch

        self._asked.write(json.dumps(ids).encode() + b"\n")
        self._asked.flush()
        size = len(ids) * self._vocab_size * 4
        data = bytearray(self._answers.read(size))
        if len(data) < size:
            sys.exit("llama.cpp stopped.")
        return torch.frombuffer(data, dtype=torch.float32).view(len(ids), -1)

    def close(self) -> None:
        self._asked.close()
        self._process.wait()


def worker(about: dict[str, Any]) -> None:
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from cyllama._internal import build_config
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self) -> int:
            """cyllama 0.2.18 asks for it where it gives logits, and lacks it."""
            return self.get_vocab().n_vocab

    llama_cpp.disable_logging()
    path = about["path"]
    if FTYPES[about["kind"]] is not None:
        path = str(Path(about["folder"]) / f"{about['kind']}.gguf")
        quantizing = llama_cpp.LlamaModelQuantizeParams()
        quantizing.ftype = FTYPES[about["kind"]]
        quantizing.allow_requantize = True
        quantizing.nthread = about["threads"]
        llama_cpp.model_quantize(about["path"], path, quantizing)
    parameters = llama_cpp.LlamaModelParams()
    # repacked weights end in kernels that die on some machines
    parameters.use_extra_bufts = False
    model = Model(path, parameters, verbose=False)
    settings = llama_cpp.LlamaContextParams()
    settings.n_threads = settings.n_threads_batch = about["threads"]
    context = llama_cpp.LlamaContext(model, settings, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=settings.n_ctx, embd=0, n_seq_max=1)
    named = f"llama.cpp {build_config.versions()['llama_cpp_version']}"
    channel.write(json.dumps([named, model.n_vocab]).encode() + b"\n")
    channel.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        context.kv_cache_clear()
        batch.reset()
        for position, token in enumerate(ids):
            batch.add(token, position, [0], True)
        context.decode(batch)
        for i in range(len(ids)):
            channel.write(array("f", context.get_logits_ith(i)).tobytes())
        channel.flush()


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['reference']}; {report['llama_cpp']}",
        f"{'':20} places   same token, %   KL, nats              worst KL",
    ]
    for name, row in report["rows"].items():
        lines.append(f"{name:20} {row['places']:6}   {_pair(row)}   {row['kl_worst']:8.1e}")
    lines += [f"{name:20}          {_pair(row)}" for name, row in report["differences"].items()]
    return "\n".join(lines)


def _pair(row: dict[str, Any]) -> str:
    same, kl = row["agreement"], row["kl"]
    return (
        f"{100 * same['value']:6.2f} ±{100 * same['standard_error']:4.2f}   "
        f"{kl['value']:10.3e} ±{kl['standard_error']:.1e}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
    else:
        main()
