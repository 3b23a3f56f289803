"""The prompts of the default adapter: `python mix_prompts.py TRAIN_PROMPTS PROGRAMMING_PROMPTS prompts.jsonl.gz`.

TRAIN_PROMPTS holds lines with `source` and `prompt` (GSM8K's training half, P3, Self-Instruct's user instructions). Sources are
interleaved in fixed shares, so that any first part of the file has the mixture of the whole.
"""

import gzip
import json
import random
import sys
from itertools import islice

SHARES = {"gsm8k-train": 35, "t0-p3": 42, "self-instruct-user": 5, "python-stdlib": 18}
ROUNDS = 46


def lines(path):
    """The records of a JSONL file, gzipped or not."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mixture(train, programming):
    """The prompts in order, each once."""
    rng = random.Random(1)
    sources = {}
    for record in train:
        sources.setdefault(record["source"], []).append(record)
    for records in sources.values():
        rng.shuffle(records)
    sources["python-stdlib"] = programming
    yield from taking_turns(sources, SHARES, ROUNDS, rng)


def taking_turns(sources, shares, rounds, rng):
    """The sources' prompts in fixed shares, shuffled round by round, each once."""
    queues = {source: iter(sources[source]) for source in shares}
    seen = set()
    for _ in range(rounds):
        part = [record for source, share in shares.items() for record in islice(queues[source], share)]
        rng.shuffle(part)
        for record in part:
            if record["prompt"] not in seen:
                seen.add(record["prompt"])
                yield {"source": record["source"], "prompt": record["prompt"]}


if __name__ == "__main__":
    text = "".join(
        json.dumps(record, ensure_ascii=False) + "\n" for record in mixture(lines(sys.argv[1]), lines(sys.argv[2]))
    )
    with gzip.GzipFile(sys.argv[3], "wb", mtime=0) as file:
        file.write(text.encode())
