"""What each forward did, one JSON record a line: for replay, pictures and questions that nobody has thought of yet.

A trace is an observer. It keeps to what a person needs to see an answer come about: what became final, what stood tentatively
behind it, what a verification threw away, and what the forward cost. Reading and drawing it is `viz.replay`'s business.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from trimode.decoding.generate import Observer, RunSteps
from trimode.decoding.interface import Generation, Outcome, Predictions, Step

__all__ = ["Trace", "traced"]

DIGITS = 4
"""Of a probability."""


@dataclass(slots=True)
class _Progress:
    """Where one request stands."""

    generation: Generation
    """Kept while it runs, so that no other object gets its identity."""
    number: int
    block: int = 0
    step: int = 0
    num_final: int = 0
    """Final tokens before this forward."""
    drafted: list[int] = field(default_factory=list)
    """The canvas before this forward."""
    named: set[int] = field(default_factory=set)
    """Ids whose text was written."""


@dataclass(slots=True)
class _Forward:
    """The forward that ran last: what it predicted for whom, and how long it took."""

    seconds: float
    rows: dict[int, tuple[int, Predictions]]
    """By the generation's identity: the cursor before it, and the predictions."""


@dataclass(slots=True)
class Trace:
    """Writes a record a forward to `file`; give it as `observe`."""

    file: TextIO
    name_token: Callable[[int], str | None] = lambda token: None
    """One token's text, for people."""
    also: Observer | None = None
    """Told of every forward too."""
    clock: Callable[[], float] = time.perf_counter
    own_seconds: float = 0.0
    """What tracing itself took."""
    _running: dict[int, _Progress] = field(default_factory=dict)
    num_requests: int = 0
    """That it has seen so far; the next one gets this number."""
    _forward: _Forward | None = None
    _last: float | None = None
    """When the last forward was told of, on the clock."""

    def around(self, run: RunSteps) -> RunSteps:
        """The same `run`, whose predictions and time the trace gets to see."""

        def watched(generations: Sequence[Generation], steps: Sequence[Step]) -> list[Predictions]:
            start = self.clock()
            for g in generations:
                self._of(g, start).drafted = list(g.canvas)
            cursors = [g.cached for g in generations]
            begun = self.clock()
            self.own_seconds += begun - start
            predictions = run(generations, steps)
            rows = {id(g): each for g, each in zip(generations, zip(cursors, predictions, strict=True), strict=True)}
            self._forward = _Forward(self.clock() - begun, rows)
            return predictions

        return watched

    def __call__(self, g: Generation, step: Step, outcome: Outcome) -> None:
        if self.also is not None:
            self.also(g, step, outcome)
        start = self.clock()
        progress = self._of(g, start)
        record = self._record(g, step, outcome, progress)
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()
        progress.step += 1
        # quadratic self-speculation never lets its canvas run empty: there each verification opens the next block
        if outcome.committed and (not g.canvas or outcome.accepted is not None):
            progress.block += 1
        progress.drafted, progress.num_final = list(g.canvas), len(g.final)
        if g.finish_reason is not None:
            del self._running[id(g)]
        self._last = self.clock()
        self.own_seconds += self._last - start

    def _of(self, g: Generation, now: float) -> _Progress:
        if id(g) not in self._running:
            self._running[id(g)] = _Progress(g, self.num_requests, num_final=len(g.prompt))
            self.num_requests += 1
            if self._last is None:
                self._last = now
        return self._running[id(g)]

    def _record(self, g: Generation, step: Step, outcome: Outcome, progress: _Progress) -> dict[str, Any]:
        forward = self._forward
        cursor, predictions = (None, None) if forward is None else forward.rows.get(id(g), (None, None))
        seconds = forward.seconds if forward is not None else self.clock() - (self._last or 0.0)
        start = progress.num_final
        committed = []
        for i, token in enumerate(g.final[start:]):  # not outcome.committed: the answer may have ended inside it
            sure: float | None = None
            if i < len(outcome.probabilities):
                sure = outcome.probabilities[i]
            elif cursor is not None and predictions is not None:
                sure = _probability(step, cursor, predictions, start + i, token)
            committed.append([start + i, token, None if sure is None else round(sure, DIGITS)])
        rejected = []
        if outcome.accepted is not None:
            thrown = progress.drafted[outcome.accepted :]
            # what the answer's end cut off was neither accepted nor rejected
            behind = start + outcome.accepted
            rejected = [[behind + i, token] for i, token in enumerate(thrown)] if g.finish_reason is None else []
        mask = g.traits.mask_token_id
        canvas = [] if g.finish_reason is not None else g.canvas
        tentative = [[len(g.final) + i, None if token == mask else token] for i, token in enumerate(canvas)]
        return {
            "request": progress.number,
            "block": progress.block,
            "step": progress.step,
            "kind": step.kind,
            "committed": committed,
            "revised": outcome.revised,
            "accepted": outcome.accepted,
            "seconds": round(seconds, 6),
            "inputs": len(step.tokens),
            "canvas": tentative,
            "rejected": rejected,
            "texts": self._names(progress, committed, tentative, rejected),
        }

    def _names(self, progress: _Progress, *places: list[list[Any]]) -> dict[str, str]:
        """Texts of the ids that this request shows for the first time."""
        new = {place[1] for listed in places for place in listed if place[1] is not None} - progress.named
        progress.named |= new
        texts = {token: self.name_token(token) for token in sorted(new)}
        return {str(token): text for token, text in texts.items() if text is not None}


def traced(run: RunSteps, observe: Observer | None) -> RunSteps:
    """`run`, seen by the observer too if it is a trace."""
    return observe.around(run) if isinstance(observe, Trace) else run


def _probability(step: Step, cursor: int, predictions: Predictions, place: int, token: int) -> float | None:
    """What the model gave this token at this place of the text, before temperature and penalties.

    Where several rows predict one place (quadratic self-speculation) the first, causal one is meant.
    """
    offsets = step.view.offsets(len(step.tokens))
    for row, i in enumerate(step.after):
        if cursor + offsets[i] + 1 == place:
            return float(predictions.after.logits[row].float().softmax(dim=-1)[token])
    for row, i in enumerate(step.at):
        if cursor + offsets[i] == place:
            return float(predictions.at.logits[row].float().softmax(dim=-1)[token])
    return None
