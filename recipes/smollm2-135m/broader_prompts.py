"""Prompts of more kinds than before: `python broader_prompts.py TRAIN_PROMPTS > FILE`.

Of what `prompts.jsonl.gz` and `passage_answers.jsonl.gz` left over: P3's own prompts, prompts with something to read made of them
(`passage_prompts.py`), and questions of GSM8K's training half. Kinds take turns, so that any first part of the file has the mixture
of the whole.
"""

import json
import random
import sys
from pathlib import Path

from mix_prompts import taking_turns
from passage_prompts import lines, mixture

import trimode

HERE = Path(__file__).parent
SHARES = {"made": 9, "t0-p3": 12, "gsm8k-train": 4}
ROUNDS = 300


def left_over(train):
    """Prompts by kind that no earlier answers are to."""
    encode = trimode.load("smollm2-135m").encode
    used = [record["prompt"] for record in lines(HERE / "prompts.jsonl.gz")]
    answered = {tuple(record["prompt_ids"]) for record in lines(HERE / "passage_answers.jsonl.gz")}
    made = list(mixture(train, used))
    # the earlier answers are to some of the first of these
    seen = {*used, *(r["prompt"] for r in made[:6000] if tuple(encode(r["prompt"])) in answered)}
    rng = random.Random(3)
    kinds = {"made": [r for r in made if r["prompt"] not in seen and r["source"] not in ("made-p3", "made-gsm8k")]}
    for source in ("t0-p3", "gsm8k-train"):
        own = [record["prompt"] for record in train if record["source"] == source and record["prompt"] not in seen]
        kinds[source] = [{"source": source, "prompt": prompt} for prompt in own]
        rng.shuffle(kinds[source])
    return kinds, rng


if __name__ == "__main__":
    kinds, rng = left_over(lines(sys.argv[1]))
    for record in taking_turns(kinds, SHARES, ROUNDS, rng):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
