"""Texts and answers from a file, scored under both views: nats a token, exact and bounded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimode.errors import ContextLengthError, PromptError
from trimode.evaluation.evaluate import with_shots
from trimode.evaluation.likelihood import autoregressive_score, diffusion_score
from trimode.evaluation.speed_of_light import ratio
from trimode.evaluation.tasks.files import read_examples
from trimode.evaluation.tasks.interface import Example

__all__ = ["ScoredText", "read_texts", "score_texts", "summarise_texts"]

WANTED = "{text}, or {prompt, answer} as `trimode eval` keeps its samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """One text under both views; log-likelihoods in nats."""

    id: str
    group: str
    """The setting that wrote it, where the file says so."""
    tokens: int
    """Scored; the context before them is not."""
    ar: float
    ar_is_greedy: bool
    bound: float
    bound_error: float
    """Standard error of the bound, from its own draws."""
    forwards: int


def read_texts(path: Path, *, limit: int | None) -> list[Example]:
    """Raises DataError."""
    return read_examples(path, _parse, limit=limit, wanted=WANTED)


def _parse(record: Mapping[str, Any], number: int) -> Example:
    group = str(record.get("setting", "texts"))
    name = f"{record['id']} {group}" if "id" in record else f"text/{number}"
    if "text" in record:
        answer, prompt = record["text"], ""
    else:
        answer, prompt = record["answer"], record["prompt"]
    if not isinstance(answer, str) or not isinstance(prompt, str):
        raise TypeError(f"texts must be strings; got {str(answer)[:40]!r}")
    shots = tuple((str(asked), str(told)) for asked, told in record.get("shots", ()))
    return Example(id=name, prompt=prompt, reference={"answer": answer, "group": group}, shots=shots)


def score_texts(
    model: Any,
    texts: Sequence[Example],
    *,
    samples: int = 4,
    seed: int = 0,
    block_length: int | None = None,
    done: Callable[[str], bool] = lambda id: False,
) -> Iterator[dict[str, Any]]:
    """Each text as it is scored, plain values. One without two tokens, or too long for the model, is left out.

    Raises MissingMaskTokenError for a checkpoint without a block view.
    """
    for text in texts:
        if done(text.id):
            continue
        try:
            context, target = _split(model, text)
            ar = autoregressive_score(model, context, target)
            bound = diffusion_score(model, context, target, samples=samples, seed=seed, block_length=block_length)
        except (ContextLengthError, PromptError):
            continue
        scored = ScoredText(
            id=text.id,
            group=text.reference["group"],
            tokens=len(target),
            ar=ar.total,
            ar_is_greedy=ar.is_greedy,
            bound=bound.total,
            bound_error=bound.standard_error,
            forwards=bound.num_forwards,
        )
        yield asdict(scored)


def _split(model: Any, text: Example) -> tuple[list[int], list[int]]:
    answer = text.reference["answer"]
    if not text.prompt:
        # a bare text: its first token is given
        ids = model.encode(answer, raw=True)
        return ids[:1], ids[1:]
    return model.encode(with_shots(model, text)), list(model.tokenizer.encode(answer))


def summarise_texts(scored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a group: nats a token under both views and their gap, the text as the unit of chance."""
    rows = []
    for group in dict.fromkeys(s["group"] for s in scored):
        here = [{"prompt": s["id"], **s, "gap": s["ar"] - s["bound"]} for s in scored if s["group"] == group]
        tokens = sum(s["tokens"] for s in here)
        rows.append(
            {
                "group": group,
                "texts": len(here),
                "tokens": tokens,
                "ar_per_token": ratio(here, "ar", "tokens"),
                "bound_per_token": ratio(here, "bound", "tokens"),
                "gap_per_token": ratio(here, "gap", "tokens"),
                "bound_draw_error": sum(s["bound_error"] ** 2 for s in here) ** 0.5 / tokens,
            }
        )
    return rows
