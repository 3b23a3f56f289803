"""How few forwards could fill a block with given tokens: a search over the sets of places that are already known.

A *state* is the set of places that hold the target's tokens (bit i: place i). One forward over a state shows which of the other
places the model would fill rightly now; an ideal sampler commits any of those, and the question is which. Nothing here runs a model:
it is handed the function that looks at states.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["Found", "Lattice", "Look", "fewest_passes", "longest_runs"]

Look = Callable[[Sequence[int]], list[list[tuple[float, int]]]]
"""States to what each one shows: (confidence, place) of every unknown place whose likeliest token is the target's."""


@dataclass(slots=True)
class Lattice:
    """What is known of a block's states, and what finding out more may cost."""

    num_places: int
    look: Look
    budget: int
    """States that may be looked at."""
    num_looked: int = 0
    _matches: dict[int, list[int]] = field(default_factory=dict)

    @property
    def full(self) -> int:
        return (1 << self.num_places) - 1

    def can_look(self, states: Iterable[int]) -> bool:
        """Whether the budget allows looking at all of these."""
        return self.num_looked + len(set(states) - self._matches.keys()) <= self.budget

    def matches(self, states: Sequence[int]) -> list[list[int]]:
        """Of each state the places that it would fill rightly, surest first (ties: leftmost)."""
        new = list(dict.fromkeys(s for s in states if s not in self._matches))
        if new:
            for state, shown in zip(new, self.look(new), strict=True):
                self._matches[state] = [p for _, p in sorted(shown, key=lambda m: (-m[0], m[1])) if not state >> p & 1]
            self.num_looked += len(new)
        return [self._matches[s] for s in states]

    def is_known(self, state: int) -> bool:
        """Whether looking again is free."""
        return state in self._matches


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The fewest forwards that a search found."""

    passes: int
    at_least: int
    """No way is shorter than this; equal to `passes` where the search ended within its budget."""
    path: tuple[int, ...]
    """The states from empty to done, one after each forward."""
    num_looked: int

    @property
    def is_proven(self) -> bool:
        return self.at_least == self.passes


def fewest_passes(lattice: Lattice, serial: Sequence[int], goal: int | None = None) -> Found:
    """The fewest forwards from an empty block to one that holds `goal` (all places if None).

    serial: places in the order in which one a forward was filled, which is a way that works. First, from each state on that way, the
    largest safe set is committed (arXiv 2607.05722, section 4): the surest matches, as many as binary search finds from which going on
    greedily still arrives. Then all shorter ways are tried, level by level, as far as the budget goes.
    """
    goal = lattice.full if goal is None else goal
    best = _by_compaction(lattice, serial, goal)
    return _by_levels(lattice, best, goal)


def _by_compaction(lattice: Lattice, serial: Sequence[int], goal: int) -> list[int]:
    plan = _cut(list(itertools.accumulate((1 << p for p in serial), int.__or__)), goal)
    best = plan
    done: list[int] = []
    state = 0
    while goal & ~state:
        if not lattice.can_look([state]):
            break
        matches = lattice.matches([state])[0]
        low, high, found = 0, len(matches), None
        while low < high:
            size = (low + high + 1) // 2
            start = state | _bits(matches[:size])
            rest = _greedily(lattice, start, goal)
            if rest is None:
                high = size - 1
            else:
                low, found = size, [start, *rest]
        if found is not None:
            plan = found
        if len(done) + len(plan) < len(best):
            best = [*done, *plan]
        state, plan = plan[0], plan[1:]
        done.append(state)
    return best if goal & ~state or len(best) <= len(done) else done


def _greedily(lattice: Lattice, state: int, goal: int) -> list[int] | None:
    """The states after `state` when every forward commits all that matches; None where that gets stuck or too dear."""
    states = []
    while goal & ~state:
        if not lattice.can_look([state]):
            return None
        matches = _bits(lattice.matches([state])[0])
        if not matches:
            return None
        state |= matches
        states.append(state)
    return states


def _by_levels(lattice: Lattice, best: list[int], goal: int) -> Found:
    came_from: dict[int, int] = {0: 0}
    level = [0]
    at_least, is_complete = 1, True
    for _ in range(1, len(best)):
        # the fuller a state, the likelier it is that one forward more finishes it
        level.sort(key=lambda s: (-s.bit_count(), s))
        for chunk in _chunks(lattice, level):
            for state, matches in zip(chunk, lattice.matches(chunk), strict=True):
                if not goal & ~(done := state | _bits(matches)):
                    return _found(lattice, [*_way(came_from, state), done], at_least)
        known = [s for s in level if lattice.is_known(s)]
        is_complete = is_complete and len(known) == len(level)
        at_least += is_complete
        following: list[int] = []
        for state, reached in _successors(lattice, known):
            if reached not in came_from:
                if len(following) >= _MOST_STATES:
                    is_complete = False
                    break
                came_from[reached] = state
                following.append(reached)
        level = following
    return _found(lattice, best, len(best) if is_complete else at_least)


_CHUNK = 16
"""States that are looked at together."""
_MOST_STATES = 20_000
"""States of a level that the search remembers."""


def _chunks(lattice: Lattice, states: Sequence[int]) -> Iterator[list[int]]:
    """The states, a few at a time, as long as the budget allows looking at them."""
    yield [s for s in states if lattice.is_known(s)]
    new = [s for s in states if not lattice.is_known(s)]
    while new and lattice.budget > lattice.num_looked:
        size = min(_CHUNK, lattice.budget - lattice.num_looked)
        yield new[:size]
        new = new[size:]


def _successors(lattice: Lattice, states: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each state with each state that one more forward can lead to."""
    for state, matches in zip(states, lattice.matches(states), strict=True):
        for subset in _subsets(matches):
            yield state, state | subset


def longest_runs(lattice: Lattice, most_passes: int) -> tuple[list[int], bool]:
    """The longest leading run of right places after 1, 2, ... forwards whose commits were chosen best, and whether this is proven.

    The last forward commits all that matches. Ends early once the run is the whole block.
    """
    runs: list[int] = []
    level, seen = [0], {0}
    is_complete = True
    for _ in range(most_passes):
        level.sort(key=lambda s: (-s.bit_count(), s))
        after = [
            state | _bits(matches)
            for chunk in _chunks(lattice, level)
            for state, matches in zip(chunk, lattice.matches(chunk), strict=True)
        ]
        is_complete = is_complete and len(after) == len(level)
        if not after:
            break
        runs.append(max([_leading(s) for s in after] + runs[-1:]))
        if runs[-1] == lattice.num_places:
            break
        known = [s for s in level if lattice.is_known(s)]
        following: list[int] = []
        for _, reached in _successors(lattice, known):
            if reached not in seen:
                if len(following) >= _MOST_STATES:
                    is_complete = False
                    break
                seen.add(reached)
                following.append(reached)
        level = following
    return runs, is_complete


def _found(lattice: Lattice, path: list[int], at_least: int) -> Found:
    return Found(passes=len(path), at_least=at_least, path=tuple(path), num_looked=lattice.num_looked)


def _way(came_from: dict[int, int], state: int) -> list[int]:
    way = []
    while state:
        way.append(state)
        state = came_from[state]
    return way[::-1]


def _subsets(places: Sequence[int]) -> Iterator[int]:
    """All sets but the empty one, the largest first."""
    for size in range(len(places), 0, -1):
        for chosen in itertools.combinations(places, size):
            yield _bits(chosen)


def _bits(places: Iterable[int]) -> int:
    return sum(1 << p for p in places)


def _leading(state: int) -> int:
    return (~state & (state + 1)).bit_length() - 1


def _cut(states: list[int], goal: int) -> list[int]:
    """The states up to the first that holds the goal."""
    return states[: next(i for i, s in enumerate(states) if not goal & ~s) + 1]
