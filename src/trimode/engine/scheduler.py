"""Who is next, and which part of a long step fits into this forward.

A long step is read in pieces: leading inputs that see causally and that nobody asks about may be cached ahead, by causal forwards of
the engine's own; what is left is the same step, shorter. Decoders never learn of it, so an answer does not depend on it.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from trimode.decoding.interface import Generation, Step
from trimode.errors import QueueFullError
from trimode.model.views import BlockOverCausal, Causal

__all__ = ["FairQueue", "Pace", "num_ahead", "piece_of", "without_leading"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within one client; clients take turns. Bounded."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def put(self, client: str, item: T) -> None:
        """Wait in line. Raises QueueFullError."""
        if len(self) >= self.capacity:
            raise QueueFullError(f"{len(self)} requests are waiting already, as many as may. Try again in a while.")
        self._lines.setdefault(client, deque()).append(item)
        self._length += 1

    def peek(self) -> T | None:
        """Whose turn it is."""
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> T:
        """Let the next one in; its client goes to the end of the turn."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._length -= 1
        del self._lines[client]
        if line:
            self._lines[client] = line
        return item

    def remove(self, item: T) -> bool:
        """Leave the line; False if it was not in it."""
        for client, line in self._lines.items():
            if item in line:
                line.remove(item)
                self._length -= 1
                if not line:
                    del self._lines[client]
                return True
        return False


class Pace:
    """How many inputs of long prompts a forward takes along so that those who wait for tokens wait little more, as measured.

    What a prompt's piece adds to a forward is told from forwards with and without one; both are smoothed, and forget.
    """

    LEAST, FIRST, MOST = 8, 16, 256
    SHARE = 0.6
    """Of an ordinary step that a piece may add: what it costs varies, and two steps are the bound."""

    def __init__(self) -> None:
        self._ordinary_s: float | None = None
        self._input_s: float | None = None

    @property
    def allowance(self) -> int:
        """Inputs of the next piece."""
        if self._ordinary_s is None or self._input_s is None:
            return self.FIRST
        return max(self.LEAST, min(self.MOST, int(self.SHARE * self._ordinary_s / self._input_s)))

    def note(self, num_read: int, seconds: float) -> None:
        """A forward for others, with so many inputs of prompts among them, took so long."""
        if not num_read:
            self._ordinary_s = _smoothed(self._ordinary_s, seconds)
        elif self._ordinary_s is not None:
            # a forward that was no slower than an ordinary one still says that inputs are cheap
            added = max(seconds - self._ordinary_s, 0.02 * self._ordinary_s)
            self._input_s = _smoothed(self._input_s, added / num_read)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new


def num_ahead(g: Generation, step: Step) -> int:
    """Leading inputs of a step that may be cached ahead of it. The last final token never is: later steps may ask what follows it."""
    if not isinstance(step.view, Causal | BlockOverCausal):
        return 0
    # the place before an `at` input is where a shifted checkpoint predicts it
    needed = (*step.after, *(i - 1 for i in step.at), *step.adapted)
    return max(0, min(len(g.uncached) - 1, step.view.num_causal(len(step.tokens)), len(step.tokens) - 1, *needed))


def piece_of(step: Step, length: int) -> Step:
    """The forward that caches the first `length` inputs of a step ahead."""
    return Step(kind="prefill", tokens=step.tokens[:length], view=Causal())


def without_leading(step: Step, num: int) -> Step:
    """What is left of a step when its first `num` inputs are cached."""
    view = step.view
    if isinstance(view, BlockOverCausal):
        view = BlockOverCausal(view.causal_length - num)
    return replace(
        step,
        tokens=step.tokens[num:],
        view=view,
        after=tuple(i - num for i in step.after),
        at=tuple(i - num for i in step.at),
        adapted=tuple(i - num for i in step.adapted),
    )
