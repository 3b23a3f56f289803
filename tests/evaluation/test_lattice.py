"""The search for the fewest forwards equals brute force over all ways, and says so only where it does."""

import random
from functools import cache

import pytest

from trimode.evaluation.lattice import Lattice, fewest_passes, longest_runs

PLACES = 6
FULL = (1 << PLACES) - 1


def bits(places):
    return sum(1 << p for p in places)


def world(seed, places=PLACES):
    """States to what they show, at random: knowing more may well spoil a guess. And a serial order that works."""
    rng = random.Random(seed)
    order = rng.sample(range(places), places)
    serial = [bits(order[:n]) for n in range(places + 1)]
    ease = rng.uniform(0.1, 0.8)
    shows = {}
    for state in range(1 << places):
        unknown = [p for p in range(places) if not state >> p & 1]
        shows[state] = [(rng.random(), p) for p in unknown if rng.random() < ease]
    for n, place in enumerate(order):
        rest = [m for m in shows[serial[n]] if m[1] != place]
        shows[serial[n]] = [(1.0, place), *rest]
    return shows, order


def brute_force(shows, goal=FULL):
    """Fewest forwards from nothing to the goal over every choice of every nonempty subset."""

    @cache
    def least(state):
        if not goal & ~state:
            return 0
        places = [p for _, p in shows[state]]
        choices = range(1, 1 << len(places))
        ways = (least(state | bits(p for i, p in enumerate(places) if c >> i & 1)) for c in choices)
        return 1 + min(ways, default=float("inf"))

    return least(0)


def lattice(shows, budget=1000, places=PLACES):
    return Lattice(places, lambda states: [shows[s] for s in states], budget)


@pytest.mark.parametrize("seed", range(60))
def test_the_fewest_passes_equal_brute_force(seed):
    shows, order = world(seed)
    found = fewest_passes(lattice(shows), order)
    assert found.is_proven
    assert found.passes == brute_force(shows)
    state = 0
    for reached in found.path:
        assert reached & ~state
        assert not (reached & ~state) & ~bits(p for _, p in shows[state])
        state = reached
    assert state == FULL
    goal = bits(range(3))
    assert fewest_passes(lattice(shows), order, goal).passes == brute_force(shows, goal)


@pytest.mark.parametrize("budget", [1, 4, 9, 20])
def test_a_small_budget_is_kept_and_never_claims_what_is_not_so(budget):
    beaten = 0
    for seed in range(60):
        shows, order = world(seed)
        one = lattice(shows, budget)
        found = fewest_passes(one, order)
        true = brute_force(shows)
        assert one.num_looked <= budget
        assert found.at_least <= true <= found.passes <= PLACES
        assert not found.is_proven or found.passes == true
        beaten += found.passes < PLACES
    assert beaten > (0 if budget == 1 else 20)


def longest_by_brute_force(shows, passes):
    def leading(state):
        return next((p for p in range(PLACES) if not state >> p & 1), PLACES)

    states, best = {0}, []
    for _ in range(passes):
        best.append(max([leading(s | bits(p for _, p in shows[s])) for s in states] + best[-1:]))
        reached = set(states)
        for s in states:
            places = [p for _, p in shows[s]]
            reached |= {s | bits(p for i, p in enumerate(places) if c >> i & 1) for c in range(1 << len(places))}
        states = reached
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_runs_equal_brute_force(seed):
    shows, _ = world(seed)
    runs, is_proven = longest_runs(lattice(shows), 4)
    assert is_proven
    expected = longest_by_brute_force(shows, 4)
    assert runs == expected[: len(runs)]
    assert len(runs) == 4 or runs[-1] == PLACES or expected[-1] == runs[-1]


def test_a_block_of_sixteen_places_ends_in_time():
    shows, order = world(5, places=16)
    found = fewest_passes(lattice(shows, 200, 16), order)
    assert found.passes <= 16
    everything = {s: [(1.0, p) for p in range(31) if not s >> p & 1] for s in (0,)}
    runs, is_proven = longest_runs(Lattice(31, lambda states: [everything.get(s, []) for s in states], 50), 3)
    assert (runs, is_proven) == ([31], True)
