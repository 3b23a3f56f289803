"""Two adapters side by side on prompts: `python compare_adapters.py PROMPTS.jsonl[.gz] EACH ADAPTER...`.

Greedy self-speculation gives the base's own text, so its rounds follow from one teacher-forced pass over that text: which drafts behind
each place are the base's choice. EACH prompts of each kind are answered by the base (greedy, 128 tokens, bfloat16), and the forwards
of linear and quadratic rounds of blocks of 8 are counted for each adapter on the same texts, prompt by prompt.
"""

import gzip
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

import trimode
from trimode.checkpoint import open_checkpoint
from trimode.checkpoint.adapter_files import open_adapter
from trimode.model.transformer import Transformer
from trimode.training.data import Document, pack
from trimode.training.objectives import drafts_that_match
from trimode.training.trainable import AdapterParameters, TrainableModel

BLOCK_LENGTH = 8
MAX_NEW_TOKENS = 128


def chosen(path, each):
    """The first prompts of each kind."""
    counts = Counter()
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            counts[record["category"]] += 1
            if counts[record["category"]] <= each:
                yield record


def forwards(matched, num_tokens, kind):
    """Decode forwards for an answer: a round emits the exact token, the drafts that match, and for linear rounds, which take two
    forwards, the token that the check adds."""
    place = count = 0
    while place < num_tokens:
        drafts = matched[place] if place < len(matched) else 0
        place += 1 + drafts + (kind == "linear")
        count += 2 if kind == "linear" else 1
    return count


def main(prompts, each, adapters):
    checkpoint = open_checkpoint("smollm2-135m")
    model = trimode.load("smollm2-135m", dtype="bfloat16")
    records = list(chosen(prompts, each))
    ids = [model.encode(record["prompt"]) for record in records]
    answers = []
    for start in range(0, len(ids), 20):
        answers += model.generate(ids[start : start + 20], mode="ar", max_new_tokens=MAX_NEW_TOKENS)
        print(f"{len(answers)} of {len(ids)} answered", file=sys.stderr, flush=True)
    transformer = Transformer(checkpoint.config, dtype=torch.bfloat16)
    transformer.load(checkpoint.tensors(dtype=torch.bfloat16), pack=False)
    trained = []
    for path in adapters:
        stored = open_adapter(Path(path), checkpoint.config)
        lora = stored.read()
        width = 0 if lora.successor is None else len(lora.successor.inner)
        parameters = AdapterParameters(transformer, rank=stored.rank, alpha=lora.scale * stored.rank, successor=width)
        parameters.take(lora)
        trained.append(TrainableModel(transformer, parameters).eval())
    sums = defaultdict(Counter)
    for record, prompt, answer in zip(records, ids, answers, strict=True):
        tokens = answer.token_ids
        if len(tokens) < 4:
            continue
        batch = pack([Document((*prompt, *tokens), len(prompt))], [0])
        for path, one in zip(adapters, trained, strict=True):
            right, _ = drafts_that_match(one, batch, block_length=BLOCK_LENGTH, blocks_per_document=len(tokens) + 1)
            matched = right.long().cumprod(dim=1).sum(dim=1).tolist()
            for kind in (record["category"], "all"):
                sums[path, kind]["tokens"] += len(tokens)
                for rounds in ("linear", "quadratic"):
                    sums[path, kind][rounds] += forwards(matched, len(tokens), rounds)
    kinds = [*dict.fromkeys(record["category"] for record in records), "all"]
    print("tokens a decode forward".ljust(34), *(kind[:14].rjust(14) for kind in kinds))
    for path in adapters:
        for rounds in ("linear", "quadratic"):
            rates = (sums[path, kind]["tokens"] / sums[path, kind][rounds] for kind in kinds)
            print(f"{path[-22:]} {rounds}".ljust(34), *(f"{rate:14.3f}" for rate in rates))


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
