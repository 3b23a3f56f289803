"""Prompts with something to read, made of P3's: `python passage_prompts.py TRAIN_PROMPTS USED_PROMPTS > FILE`.

Texts to summarize, to answer from (one passage or several), questions without a passage, sentences to translate, and the questions of
GSM8K's training half that USED_PROMPTS (the first 4,600, in `prompts.jsonl.gz`) left over. Kinds take turns, so that any first part of
the file has the mixture of the whole.
"""

import gzip
import json
import random
import re
import sys

LANGUAGES = ("German", "French", "Spanish", "Italian")
SUMMARIES = ("Summarize: {}", "Summarize the following text.\n\n{}", "{}\n\nWrite a short summary.", "TL;DR:\n{}")
SINGLE = ("{1}\n\nQuestion: {0}", "Answer the question from the text.\n\nText: {1}\n\nQuestion: {0}\nAnswer:")
SEVERAL = (
    "Below are some passages. Answer the question with their help.\n\n{1}\n\nQuestion: {0}",
    "{1}\n\n{0}",
    "Use the documents to answer.\n\n{1}\n\nQuestion: {0}\n\nAnswer: ",
)
TRANSLATIONS = ("Translate {0} to {1}: {2}", "Translate this sentence into {1}: {2}", "How do you say in {1}: {2}")
SHARES = {"summary": 5, "reading": 2, "passages": 5, "question": 5, "translation": 4, "p3": 2, "gsm8k": 3}


def lines(path):
    """The records of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prose(text):
    """Whether a text reads like running text: sentences, few lines."""
    return len(re.findall(r"[.!?](\s|$)", text)) >= 3 and text.count("\n") <= 6


def made(p3, rng):
    """Prompts by kind."""
    passages = [t for t in p3 if len(t) > 500 and prose(t)]
    questions = sorted({q.strip() for t in p3 for q in re.findall(r"(?:^|[\n:.] ?)((?:[A-Z][^\n?.:]{12,110})\?)", t)})
    asked = [q for q in questions if re.match(r"(Who|What|When|Where|Which|Why|How)\b", q)]
    sentences = sorted({s.strip() for t in p3 for s in re.findall(r"(?<=[.!?] )([A-Z][^.!?\n:]{30,160}[.!?])", t)})
    for some in (passages, questions, asked, sentences):
        rng.shuffle(some)
    yield "summary", [rng.choice(SUMMARIES).format(" ".join(t.split())) for t in passages]
    yield "summary", [rng.choice(SUMMARIES).format("\n\n".join(rng.sample(passages, 2))) for _ in passages[:300]]
    yield "reading", [rng.choice(SINGLE).format(rng.choice(asked), t) for t in passages]
    several = []
    for question in asked:
        chosen = rng.sample(passages, rng.randint(2, 4))
        listed = "\n\n".join(f"Passage {i}: {' '.join(t.split())}" for i, t in enumerate(chosen, 1))
        several.append(rng.choice(SEVERAL).format(question, listed))
    yield "passages", several
    yield "question", asked
    yield "translation", [rng.choice(TRANSLATIONS).format("English", rng.choice(LANGUAGES), s) for s in sentences]


def mixture(train, used):
    """The prompts in order, each once and none of those used before."""
    rng = random.Random(2)
    p3 = [record["prompt"] for record in train if record["source"] == "t0-p3"]
    kinds = {kind: [] for kind in SHARES}
    for kind, prompts in made(p3, rng):
        kinds[kind] += prompts
    kinds["p3"] = [t for t in p3 if len(t) > 250]
    kinds["gsm8k"] = [record["prompt"] for record in train if record["source"] == "gsm8k-train"]
    for prompts in kinds.values():
        rng.shuffle(prompts)
    seen = set(used)
    while all(kinds.values()):
        for kind, share in SHARES.items():
            for _ in range(share):
                if kinds[kind]:
                    prompt = kinds[kind].pop()
                    if prompt not in seen:
                        seen.add(prompt)
                        yield {"source": f"made-{kind}", "prompt": prompt}


if __name__ == "__main__":
    for record in mixture(lines(sys.argv[1]), [record["prompt"] for record in lines(sys.argv[2])]):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
