"""The cost of a forward over T positions, and `ar`'s tokens a second, beside llama.cpp on the same weights and threads.

    python benchmarks/beside_llama_cpp.py [--types q4_1,q4_0,q8_0] [--threads 2] [--rounds 9] [--json FILE]

llama.cpp comes from `pip install llama-cpp-python` (it compiles). It runs in processes of its own, one a weight type, and takes turns
with trimode: every round times each engine once at each T. Types other than the file's own are made from it by llama.cpp's quantiser.
Medians; ratios are medians of the ratios within a round.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_POSITIONS = (1, 2, 4, 8, 16, 32)
NUM_CACHED = 256
NUM_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="q4_1,q4_0,q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import trimode
    from trimode.checkpoint import open_checkpoint

    path = open_checkpoint("smollm2-135m").path
    with tempfile.TemporaryDirectory() as folder:
        peers = {name: Peer(path, name, options.threads, folder) for name in options.types.split(",")}
        model = trimode.load("smollm2-135m", threads=options.threads)
        cache = model.forward.make_cache([NUM_CACHED + max(NUM_POSITIONS)])
        forward(model, cache, 0, NUM_CACHED)
        rows: dict[str, dict[str, list[float]]] = {name: {} for name in ("trimode", *peers)}
        for round_ in range(-2, options.rounds):
            for what in (*NUM_POSITIONS, "ar"):
                for name in rows:
                    seconds = ours(model, cache, what) if name == "trimode" else peers[name].seconds(what)
                    if round_ >= 0:
                        rows[name].setdefault(str(what), []).append(seconds)
        report = {
            "trimode": model.forward.describe(),
            "llama_cpp": {name: peer.about for name, peer in peers.items()},
            "threads": options.threads,
            "seconds": {n: {w: statistics.median(s) for w, s in r.items()} for n, r in rows.items()},
            "times_as_fast_as_the_best": {
                what: statistics.median(
                    min(rows[n][what][i] for n in peers) / rows["trimode"][what][i] for i in range(options.rounds)
                )
                for what in rows["trimode"]
            },
        }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(as_text(report))


def ours(model, cache, what) -> float:
    start = time.perf_counter()
    if what == "ar":
        model.generate([5, 6, 7, 8], mode="ar", max_new_tokens=NUM_TOKENS, ignore_eos=True)
    else:
        forward(model, cache, NUM_CACHED, what)
    return time.perf_counter() - start


def forward(model, cache, num_cached: int, num: int) -> None:
    from trimode.model.attention import Span
    from trimode.model.forward import Inputs
    from trimode.model.views import Causal

    span = Span(start=0, length=num, slot=0, cached=num_cached, view=Causal())
    positions = range(num_cached, num_cached + num)
    inputs = Inputs(tokens=[5 + i % 90 for i in range(num)], positions=positions, spans=[span], asked=list(range(num)))
    model.forward(inputs, cache).answers(0, num)


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, path: Path, kind: str, threads: int, folder: str) -> None:
        self.about = self._start(path, kind, threads, folder, plain=False)
        if self.about is None:
            # some of its kernels die on some machines
            self.about = self._start(path, kind, threads, folder, plain=True)
        if self.about is None:
            sys.exit("llama.cpp does not start. Install it: pip install llama-cpp-python")

    def _start(self, path: Path, kind: str, threads: int, folder: str, *, plain: bool) -> str | None:
        told = json.dumps({"path": str(path), "kind": kind, "threads": threads, "folder": folder, "plain": plain})
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self._line()
        return None if first is None or self.seconds(16) is None else first + (", without repacking" if plain else "")

    def _line(self) -> str | None:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() or None

    def seconds(self, what) -> float:
        assert self._process.stdin is not None
        # a peer that waits for its turn must not spin meanwhile
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None  # pyright: ignore[reportReturnType]
        line = self._line()
        self._process.send_signal(signal.SIGSTOP)
        return None if line is None else float(line)  # pyright: ignore[reportReturnType]


def worker(about: dict) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import llama_cpp
    import llama_cpp.llama_cpp as raw

    path = Path(about["path"])
    if about["kind"] != "q4_1":
        made = Path(about["folder"]) / f"{about['kind']}.gguf"
        parameters = raw.llama_model_quantize_default_params()
        parameters.ftype = {"q4_0": 2, "q8_0": 7}[about["kind"]]
        parameters.allow_requantize = True
        raw.llama_model_quantize(str(path).encode(), str(made).encode(), parameters)
        path = made
    if about["plain"]:
        usual = raw.llama_model_default_params

        def without_extra_buffers():
            parameters = usual()
            parameters.use_extra_bufts = False
            return parameters

        raw.llama_model_default_params = without_extra_buffers
    model = llama_cpp.Llama(
        model_path=str(path), n_ctx=1024, n_threads=about["threads"], n_threads_batch=about["threads"],
        logits_all=True, verbose=False,
    )  # fmt: skip
    channel.write(f"llama-cpp-python {llama_cpp.__version__}, {about['kind']}\n")
    channel.flush()
    model.eval([5 + i % 90 for i in range(NUM_CACHED)])
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "ar":
            model.n_tokens = 0
            tokens = model.generate([5, 6, 7, 8], temp=0.0, top_k=1, repeat_penalty=1.0)
            for _, _ in zip(range(NUM_TOKENS), tokens, strict=False):
                pass
            seconds = time.perf_counter() - start
            model.reset()
            model.eval([5 + i % 90 for i in range(NUM_CACHED)])
        else:
            model.n_tokens = NUM_CACHED
            model.eval([5 + i % 90 for i in range(int(line))])
            seconds = time.perf_counter() - start
        channel.write(f"{seconds}\n")
        channel.flush()


def as_text(report: dict) -> str:
    lines = [
        f"{report['trimode']}; {'; '.join(report['llama_cpp'].values())}; {report['threads']} threads",
        "milliseconds a forward   " + "".join(f"{T:>8}" for T in NUM_POSITIONS) + "   ar, tokens/s",
    ]
    for name, row in report["seconds"].items():
        times = "".join(f"{1e3 * row[str(T)]:8.1f}" for T in NUM_POSITIONS)
        lines.append(f"{name:<25}{times}{NUM_TOKENS / row['ar']:15.0f}")
    ratios = report["times_as_fast_as_the_best"]
    lines.append(
        "times the best of them   " + "".join(f"{ratios[str(T)]:8.2f}" for T in NUM_POSITIONS) + f"{ratios['ar']:15.2f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
    else:
        main()
