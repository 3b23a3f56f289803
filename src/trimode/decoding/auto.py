"""`auto`: before each round the cheapest exact way to go on, `ar` or a kind of self-speculation with a block length.

All of them give the autoregressive text (sampled: its distribution), so a choice costs time and never changes an answer. Who chooses is
handed in: it knows what forwards cost on this machine, which is no decoder's business. Told of every verification, it learns.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from trimode.decoding.autoregressive import Autoregressive
from trimode.decoding.interface import Choice, Generation, Outcome, Predictions, Step, Traits
from trimode.decoding.lookup import LookupSelfSpeculation, Suggestion
from trimode.decoding.reading import Reading, together
from trimode.decoding.self_speculation import LinearSelfSpeculation, QuadraticSelfSpeculation
from trimode.decoding.settings import Settings
from trimode.text.ngrams import NgramTable

__all__ = ["LARGEST_STEP", "Auto", "Chooser"]

LARGEST_STEP = 96
"""Most inputs that the step of a choice may place behind what is final."""
SEEN_EVERY = 4
"""Of forwards over one token each, every so manieth tells what it took."""


class Chooser(Protocol):
    """Knows costs, and learns how many drafts are accepted."""

    def choose(
        self, g: Generation, num_sharing: int, suggest: Callable[[Generation, int], Suggestion | None]
    ) -> Choice:
        """How a generation goes on that shares its forwards with `num_sharing` - 1 others. suggest: tells how its text may go on, for
        at most so many tokens."""
        ...

    def note(self, g: Generation, num_drafted: int, num_accepted: int) -> None:
        """A verification happened."""
        ...

    def note_cost(self, drafting: bool, num_inputs: int, context: float, seconds: float) -> None:
        """A forward over so many inputs, all of them of steps that were chosen, took so long with what was made of it. drafting: the
        adapter acted on some. context: cached positions that an input sees, their mean."""
        ...


class Auto:
    """Asks before each round, and lets the chosen decoder do it."""

    def __init__(self, chooser: Chooser, ngrams: NgramTable | None = None) -> None:
        self._chooser = chooser
        self._num_forwards = 0
        self._lookup = LookupSelfSpeculation(ngrams)
        self._kinds: dict[
            str, Autoregressive | LookupSelfSpeculation | LinearSelfSpeculation | QuadraticSelfSpeculation
        ] = {
            "ar": Autoregressive(),
            "linear": LinearSelfSpeculation(),
            "quadratic": QuadraticSelfSpeculation(),
            "lookup": self._lookup,
        }

    def plan(self, generations: Sequence[Generation]) -> list[Step]:
        return [self._plan_one(g, len(generations)) for g in generations]

    def _plan_one(self, g: Generation, num_sharing: int) -> Step:
        if g.choice is None or _is_between_rounds(g):
            choice = self._chooser.choose(g, num_sharing, self._lookup.suggest)
            if choice.kind != "quadratic":
                # what was drafted ahead is let go; the last final token leads whatever comes next
                g.canvas, g.state = [], None
            elif g.choice is not None and g.choice.block_length != choice.block_length and g.state is not None:
                choice = Choice("quadratic", g.choice.block_length)  # the draft at hand has that length
            g.choice = choice
            g.choices[str(choice)] = g.choices.get(str(choice), 0) + 1
        return self._kinds[g.choice.kind].plan_one(g)

    def absorb(
        self, generations: Sequence[Generation], steps: Sequence[Step], predictions: Sequence[Predictions]
    ) -> Reading[list[Outcome]]:
        start = time.perf_counter()
        outcomes = yield from together(map(self._absorb_one, generations, steps, predictions))
        self._num_forwards += 1
        num_inputs = num_seen = 0
        drafting = reading = False
        for g, step in zip(generations, steps, strict=True):
            num_inputs += len(step.tokens)
            num_seen += len(step.tokens) * g.cached
            drafting = drafting or bool(step.adapted)
            reading = reading or step.kind == "prefill"
        if self._num_forwards % SEEN_EVERY and num_inputs == len(steps):
            return outcomes  # what is done most is known best, and to look takes time too
        # a forward that others had a part in, or that read a prompt, tells little
        if outcomes and num_inputs == predictions[0].num_inputs and not reading:
            seconds = predictions[0].seconds + time.perf_counter() - start
            self._chooser.note_cost(drafting, num_inputs, num_seen / num_inputs, seconds)
        return outcomes

    def _absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        assert g.choice is not None
        num_drafted = len(g.canvas)
        outcome = yield from self._kinds[g.choice.kind].absorb_one(g, step, predictions)
        if outcome.accepted is not None:
            self._chooser.note(g, num_drafted, outcome.accepted)
        return outcome

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return LARGEST_STEP


def _is_between_rounds(g: Generation) -> bool:
    """Nothing is drafted that a verification waits for, or only what a quadratic step drafted ahead."""
    return g.state is None or (g.choice is not None and g.choice.kind == "quadratic")
