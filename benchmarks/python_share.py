"""How much of a greedy answer's time is spent outside the native engine, at batch 1.

    python benchmarks/python_share.py                # the embedded model in int8: ar, kinds of self-speculation, auto

The engine's calls (`run`, `head`, `draft`) are timed from Python, the way into C++ included. The rest is decoders, runner, text and
statistics. Each setting answers several times, taking turns; the medians are printed, in milliseconds a forward as well.
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import trimode

SETTINGS = {
    "ar": {"mode": "ar"},
    "self_spec": {"mode": "self_spec"},
    "self_spec quadratic": {"mode": "self_spec", "self_spec_kind": "quadratic", "block_length": 4},
    "self_spec lookup": {"mode": "self_spec", "self_spec_kind": "lookup", "block_length": 4},
    "auto": {"mode": "auto"},
}


class Timed:
    """The engine, with the seconds of its calls added up."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds = 0.0
        self.num_runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, *given: Any) -> Any:
        self.num_runs += 1
        return self._timed(self._engine.run, given)

    def head(self, *given: Any) -> Any:
        return self._timed(self._engine.head, given)

    def draft(self, *given: Any) -> Any:
        return self._timed(self._engine.draft, given)

    def _timed(self, call: Any, given: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        try:
            return call(*given)
        finally:
            self.seconds += time.perf_counter() - start


def measured(model: Any, timed: Timed, prompt: str, knobs: dict[str, Any], num_tokens: int) -> tuple[float, float, int]:
    """Seconds of one answer, of these in the engine, and forwards."""
    timed.seconds, timed.num_runs = 0.0, 0
    start = time.perf_counter()
    for _ in model.stream(prompt, max_new_tokens=num_tokens, ignore_eos=True, **knobs):
        pass
    return time.perf_counter() - start, timed.seconds, timed.num_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", default="Explain why the sky is blue.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = trimode.load(arguments.model, quantize="int8", backend="native", threads=arguments.threads)
    timed = Timed(model.forward._model)
    model.forward._model = timed
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in SETTINGS}
    for knobs in SETTINGS.values():
        measured(model, timed, arguments.prompt, knobs, 8)
    for _ in range(arguments.rounds):
        for name, knobs in SETTINGS.items():
            found[name].append(measured(model, timed, arguments.prompt, knobs, arguments.max_new_tokens))
    report = {}
    for name, rounds in found.items():
        share = median(1 - engine / total for total, engine, _ in rounds)
        forward_ms = median(1e3 * engine / num for _, engine, num in rounds)
        python_ms = median(1e3 * (total - engine) / num for total, engine, num in rounds)
        report[name] = {"share": share, "forward_ms": forward_ms, "python_ms": python_ms, "forwards": rounds[0][2]}
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{model.forward.describe()}, {arguments.max_new_tokens} tokens, median of {arguments.rounds}")
    for name, figures in report.items():
        print(
            f"{name:20} {figures['share']:6.1%} outside the engine: {figures['python_ms']:.3f} ms beside "
            f"{figures['forward_ms']:.2f} ms a forward, {figures['forwards']} forwards"
        )


if __name__ == "__main__":
    main()
