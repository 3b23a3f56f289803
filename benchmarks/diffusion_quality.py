"""How far `diffusion` drifts: `python benchmarks/diffusion_quality.py [MODEL] [EACH] [PROMPTS]`.

For greedy answers in `ar` and in `diffusion` (threshold 0.9) to the same prompts: the mean log-likelihood of an answer's tokens
under the causal view, behind the same prompt, and the share of four-token runs that stood in the answer before.
"""

import sys
from pathlib import Path

import trimode
from trimode.evaluation.prompts import read_bench_prompts

MAX_NEW_TOKENS = 64


def loglikelihood(model, prompt, answer):
    """Mean nats of the answer's tokens."""
    logprobs = model.logits([*prompt, *answer])[len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs[range(len(answer)), answer].mean())


def repetition(answer):
    """Share of four-token runs that are not new."""
    runs = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


if __name__ == "__main__":
    model = trimode.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="float32")
    each = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    chosen, counts = [], {}
    for prompt in read_bench_prompts(Path(sys.argv[3]) if len(sys.argv) > 3 else None):
        counts[prompt.category] = counts.get(prompt.category, 0) + 1
        if counts[prompt.category] <= each:
            chosen.append(model.encode(prompt.prompt))
    print(f"{len(chosen)} prompts".ljust(24), "nats a token", " repeated", " tokens a decode forward")
    for mode, knobs in (("ar", {}), ("diffusion", {"threshold": 0.9})):
        outs = [model.generate(ids, mode=mode, max_new_tokens=MAX_NEW_TOKENS, **knobs) for ids in chosen]
        some = [(ids, out) for ids, out in zip(chosen, outs, strict=True) if len(out.token_ids) > 0]
        nats = [loglikelihood(model, ids, out.token_ids) for ids, out in some]
        again = [repetition(out.token_ids) for _, out in some]
        speed = sum(len(out.token_ids) for _, out in some) / sum(out.stats.nfe_decode for _, out in some)
        print(mode.ljust(24), f"{sum(nats) / len(nats):12.3f}", f"{sum(again) / len(again):9.1%}", f"{speed:24.2f}")
