"""llama.cpp in a process of its own: two OpenMP runtimes in one process disturb one another, and a crash must not end the benchmark.

Run as a program by `evaluation.peers`: JSON lines in, JSON lines out. The clock runs in here, around the answer alone.
"""

import json
import os
import sys
import time
from contextlib import closing
from typing import Any

from trimode.device import resident_memory

__all__ = ["serve"]


def serve(about: dict[str, Any]) -> None:
    """Load the model of `about`, say so, and answer each line of ids."""
    # llama.cpp prints where it likes; our lines have a channel of their own
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import llama_cpp.llama_cpp as raw  # pyright: ignore[reportMissingImports]
    from llama_cpp import Llama, __version__  # pyright: ignore[reportMissingImports]

    if about["plain"]:
        usual = raw.llama_model_default_params

        def without_extra_buffers() -> Any:
            parameters = usual()
            parameters.use_extra_bufts = False
            return parameters

        raw.llama_model_default_params = without_extra_buffers
    before = resident_memory() or 0
    model: Any = Llama(
        model_path=about["path"],
        n_ctx=about["context"],
        n_threads=about["threads"],
        n_threads_batch=about["threads"],
        n_gpu_layers=-1 if about["gpu"] else 0,
        use_mmap=False,  # mapped pages would count as memory only once they are touched
        verbose=False,
    )

    def say(record: dict[str, Any]) -> None:
        channel.write(json.dumps(record) + "\n")
        channel.flush()

    say({"version": __version__, "resident_bytes": (resident_memory() or 0) - before})
    for line in sys.stdin:
        asked = json.loads(line)
        say(_answer(model, asked["ids"], asked["most"], set(asked["ends"])))


def _answer(model: Any, ids: list[int], most: int, ends: set[int]) -> dict[str, Any]:
    start = time.perf_counter()
    model.reset()  # it would find the prompt in its cache the second time
    new: list[int] = []
    first = None
    with closing(model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)) as tokens:
        for token in tokens:
            if first is None:
                first = time.perf_counter() - start
            new.append(int(token))
            if token in ends or len(new) == most:
                break
    return {"ids": new, "seconds": time.perf_counter() - start, "first": first}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
