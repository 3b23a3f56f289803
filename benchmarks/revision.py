"""Repairs and harm of revision, by threshold: `python benchmarks/revision.py [MODEL]`.

Wrong tokens are planted in the blocks of the model's own greedy answers to the built-in prompts (15 % of the tokens, drawn
uniformly), and diffusion's revising passes go over them. Revision earns its place where half are repaired and at most 1 % of the
right ones harmed.
"""

import json
import sys

import trimode
from trimode.evaluation.prompts import read_bench_prompts
from trimode.evaluation.revision import measure_revision

if __name__ == "__main__":
    model = trimode.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="float32")
    prompts = [model.encode(p.prompt) for p in read_bench_prompts(limit=10)]
    answers = model.generate(prompts, mode="ar", max_new_tokens=64)
    texts = [([*ids, *out.token_ids], len(ids)) for ids, out in zip(prompts, answers, strict=True)]
    print("threshold  passes  planted  repaired  harmed")
    for passes in (1, 3, 6):
        for threshold in (0.3, 0.5, 0.7, 0.9):
            found = measure_revision(
                model, texts, threshold=threshold, passes=passes, block_length=model.config.block_length
            )
            print(
                f"{threshold:9.2f}  {passes:6d}  {found.planted:7d}  {found.repair_rate:8.1%}  {found.harm_rate:6.2%}",
                flush=True,
            )
            print(
                json.dumps(
                    {"threshold": threshold, "passes": passes, "repair": found.repair_rate, "harm": found.harm_rate}
                ),
                file=sys.stderr,
            )
