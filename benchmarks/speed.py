"""Autoregressive speed beside transformers' `generate`, and what a forward over several positions costs.

    python benchmarks/speed.py [--dtype float32] [--threads 2] [--rounds 5] [--tokens 64]

Both engines run the same weights, prompts and threads, turn by turn in one process, after a warm-up that does not count. transformers
is needed for the comparison only (`pip install transformers`). Medians, and the spread of the ratios.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import trimode
from trimode.checkpoint import open_checkpoint
from trimode.model.attention import Span
from trimode.model.forward import Inputs
from trimode.model.views import Causal

PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "List five fruits that are red.",
    "Explain what a prime number is to a child.",
    "Translate into French: The train leaves at nine.",
]
NUM_POSITIONS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = trimode.load(options.model, dtype=options.dtype, threads=options.threads, device="cpu")
    report = {
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "autoregressive": compare(model, options),
        "forward": forward_costs(model, rounds=5 * options.rounds),
    }
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def compare(model, options) -> dict:
    """Tokens a second of both engines, prompt by prompt."""
    from transformers import AutoModelForCausalLM

    path = Path(open_checkpoint(options.model).path)
    folder, gguf_file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    peer = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=model.dtype).eval()
    ours, theirs = [], []
    for round_ in range(-1, options.rounds):
        for prompt in PROMPTS:
            seconds, ids, prompt_ids = time_ours(model, prompt, options.tokens)
            peer_seconds, peer_ids = time_theirs(peer, prompt_ids, options.tokens)
            if round_ >= 0:
                ours.append(len(ids) / seconds)
                theirs.append(len(peer_ids) / peer_seconds)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "trimode_tokens_per_second": statistics.median(ours),
        "transformers_tokens_per_second": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def time_ours(model, prompt, num_tokens):
    seen = []
    start = time.perf_counter()
    out = model.generate(
        prompt, mode="ar", max_new_tokens=num_tokens, ignore_eos=True, observe=lambda g, *_: seen.append(g.prompt)
    )
    return time.perf_counter() - start, out.token_ids, seen[0]


@torch.inference_mode()
def time_theirs(peer, prompt_ids, num_tokens):
    ids = torch.tensor([prompt_ids])
    start = time.perf_counter()
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return time.perf_counter() - start, out[0, ids.shape[1] :].tolist()


def forward_costs(model, rounds: int, num_cached: int = 256) -> dict:
    """Milliseconds of a causal forward over T positions behind a cached prefix, all logits included."""
    cache = model.forward.make_cache([num_cached + max(NUM_POSITIONS)])
    times: dict[int, list[float]] = {T: [] for T in NUM_POSITIONS}
    forward(model, cache, 0, num_cached)
    for round_ in range(-2, rounds):
        for T in NUM_POSITIONS:
            start = time.perf_counter()
            forward(model, cache, num_cached, T)
            if round_ >= 0:
                times[T].append(1e3 * (time.perf_counter() - start))
    ratios = {T: statistics.median(a / b for a, b in zip(times[T], times[1], strict=True)) for T in NUM_POSITIONS}
    return {"ms": {T: statistics.median(times[T]) for T in NUM_POSITIONS}, "ratio_to_one": ratios}


def forward(model, cache, num_cached: int, num: int) -> None:
    span = Span(start=0, length=num, slot=0, cached=num_cached, view=Causal())
    positions = range(num_cached, num_cached + num)
    inputs = Inputs(tokens=range(5, 5 + num), positions=positions, spans=[span], asked=list(range(num)))
    model.forward(inputs, cache).answers(0, num)


def as_text(report: dict) -> str:
    ar, forward = report["autoregressive"], report["forward"]
    low, high = ar["ratio_spread"]
    lines = [
        f"{report['dtype']}, {report['threads']} threads",
        f"ar: trimode {ar['trimode_tokens_per_second']:.1f} tokens/s, transformers {ar['transformers_tokens_per_second']:.1f}, "
        f"ratio {ar['ratio']:.2f} ({low:.2f} to {high:.2f})",
        "positions in a forward   " + "".join(f"{T:>8}" for T in forward["ms"]),
        "milliseconds             " + "".join(f"{ms:8.1f}" for ms in forward["ms"].values()),
        "times one position       " + "".join(f"{r:8.2f}" for r in forward["ratio_to_one"].values()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
