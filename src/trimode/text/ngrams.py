"""What a model tends to say: after which few tokens it went on with which one, counted over texts of its own.

A table of n-grams drafts in no time at all. It need not be right, for what it drafts is verified, nor hold everything: contexts are
told apart by 64 bits that are made of them, and the longest one that is known speaks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trimode.errors import DataError

__all__ = ["LONGEST_CONTEXT", "MOST_CONTEXTS", "NgramTable", "count_ngrams"]

LONGEST_CONTEXT = 3
"""Tokens that are looked at. Counted on 60 prompts of Spec-Bench, four give the same speed."""
MOST_CONTEXTS = 5 << 16
"""Of a table: 4 MB. The rarest are left out."""
HELD_OUT = 10
"""Every so manieth text is kept aside to see how often the others' counts are right."""
_FILLED = 5 / 8
_MULTIPLIER = 0x9E3779B97F4A7C15
_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class NgramTable:
    """Contexts of 1 to `LONGEST_CONTEXT` tokens, and what likely follows each."""

    slots: np.ndarray
    """uint64 [a power of two]: 32 bits of the context's 64, 24 of the token, 8 of how likely it is (of 255); 0: nothing. A context
    stands where its uppermost bits say, or in the next slot that was free."""
    num_contexts: int
    vocab_size: int

    def __post_init__(self) -> None:
        n = len(self.slots)
        if self.slots.dtype != np.uint64 or self.slots.ndim != 1 or n < 2 or n & (n - 1):
            raise DataError("A table of n-grams has 2, 4, 8, ... slots of 64 bits.")
        if self.slots.all():
            raise DataError("A table of n-grams ends a search at a free slot, and no slot is free.")

    def reader(self) -> "NgramReader":
        """Looks things up in it, fast."""
        return NgramReader(self.slots, self.vocab_size)


class NgramReader:
    """Answers for few tokens at a time, where NumPy's own calls would take longer than the search."""

    def __init__(self, slots: np.ndarray, vocab_size: int) -> None:
        self._slots = memoryview(slots)  # pyright: ignore[reportArgumentType]
        self._last = len(slots) - 1
        self._shift = 65 - len(slots).bit_length()
        self._vocab_size = vocab_size

    def following(self, text: Sequence[int]) -> tuple[int, float] | None:
        """What likely follows the end of this text, and with what chance."""
        slots, last, key, found = self._slots, self._last, 0, None
        for i in range(1, min(LONGEST_CONTEXT, len(text)) + 1):
            key = ((key ^ (text[-i] + 1)) * _MULTIPLIER) & _BITS
            # else the keys of neighbouring ids would stand in a row (see `_mixed`)
            key = ((key ^ key >> 32) * _MULTIPLIER) & _BITS
            at, check = key >> self._shift, key & 0xFFFFFFFF
            while slot := slots[at]:
                if slot >> 32 == check:
                    found = slot
                    break
                at = (at + 1) & last
            if not slot:  # what is not known is not known with more before it
                break
        if found is None:
            return None
        token = found >> 8 & 0xFFFFFF
        return (token, (found & 255) / 255) if token < self._vocab_size else None


def count_ngrams(
    texts: Iterable[tuple[Sequence[int], int]], vocab_size: int, *, most: int = MOST_CONTEXTS
) -> NgramTable:
    """A table of texts, each with how many tokens of it were given: those are context, and what follows them is counted. Raises
    DataError where nothing follows."""
    keys, tokens, is_held = _contexts(texts)
    if not len(tokens):
        raise DataError("There is nothing to count: no text goes on behind what is given.")
    counts = [_Counts.of(own, tokens) for own in keys]
    chances = _chances(keys, tokens, is_held, counts)
    # what was said once behind three tokens is as often said behind two of them
    useful = [c.total >= (2 if n == LONGEST_CONTEXT else 1) for n, c in enumerate(counts, 1)]
    entries = [
        np.concatenate(parts)
        for parts in zip(
            *(
                (c.keys[u], c.best[u], chance[u], c.total[u])
                for c, chance, u in zip(counts, chances, useful, strict=True)
            ),
            strict=True,
        )
    ]
    often = np.argsort(-entries[3], kind="stable")[:most]
    return NgramTable(_placed(*(part[often] for part in entries[:3])), len(often), vocab_size)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The same, their uppermost bits hanging on all others: keys that are near one another would fill neighbouring slots."""
    return (keys ^ keys >> np.uint64(32)) * np.uint64(_MULTIPLIER)


def _contexts(texts: Iterable[tuple[Sequence[int], int]]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Of each counted token the keys of the contexts before it, by their length (0: there are not so many tokens); the token; whether
    its text is kept aside."""
    keys: list[list[np.ndarray]] = [[] for _ in range(LONGEST_CONTEXT)]
    tokens, held = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for number, (text, num_given) in enumerate(texts):
        ids = np.asarray(text, np.int64)
        first = max(num_given, 1)
        if len(ids) <= first:
            continue
        key = np.zeros(len(ids) - first, np.uint64)
        for n in range(1, LONGEST_CONTEXT + 1):
            before = np.arange(first, len(ids)) - n
            key = _mixed((key ^ (ids[before].astype(np.uint64) + np.uint64(1))) * np.uint64(_MULTIPLIER))
            keys[n - 1].append(np.where(before < 0, np.uint64(0), key))
        tokens.append(ids[first:])
        held.append(np.full(len(ids) - first, number % HELD_OUT == HELD_OUT - 1))
    joined = [np.concatenate(parts) if parts else np.empty(0, np.uint64) for parts in keys]
    return joined, np.concatenate(tokens), np.concatenate(held)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of contexts of one length."""

    keys: np.ndarray
    """In order."""
    best: np.ndarray
    """The token that followed most often; of equals the lowest."""
    times: np.ndarray
    """How often it did."""
    total: np.ndarray
    """How often anything did."""

    @classmethod
    def of(cls, keys: np.ndarray, tokens: np.ndarray) -> "_Counts":
        keys, tokens = keys[keys != 0], tokens[keys != 0]
        order = np.lexsort((tokens, keys))
        keys, tokens = keys[order], tokens[order]
        starts = np.flatnonzero(_changes(keys) | _changes(tokens))
        times = np.diff(starts, append=len(keys))
        keys, tokens = keys[starts], tokens[starts]
        order = np.lexsort((tokens, -times, keys))
        keys, tokens, times = keys[order], tokens[order], times[order]
        starts = np.flatnonzero(_changes(keys))
        total = np.add.reduceat(times, starts) if len(starts) else times
        return cls(keys[starts], tokens[starts], times[starts], total)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where these contexts stand, and whether they do."""
        at = np.minimum(np.searchsorted(self.keys, keys), max(0, len(self.keys) - 1))
        return at, (self.keys[at] == keys if len(self.keys) else np.zeros(len(keys), bool))

    @property
    def kinds(self) -> np.ndarray:
        """Which contexts are alike: as often seen, and as sure."""
        often = np.minimum(np.searchsorted([1, 2, 4, 10], self.total), 4)
        return (9 * often + np.rint(8 * self.times / self.total)).astype(np.int64)


def _changes(numbers: np.ndarray) -> np.ndarray:
    """Where a number is not the one before it."""
    found = np.ones(len(numbers), bool)
    found[1:] = numbers[1:] != numbers[:-1]
    return found


def _chances(
    keys: list[np.ndarray], tokens: np.ndarray, is_held: np.ndarray, counts: list[_Counts]
) -> list[np.ndarray]:
    """How likely each context's token follows: as often as the same counts were right about texts that had no part in them."""
    others = [_Counts.of(own[~is_held], tokens[~is_held]) for own in keys]
    right, tried = np.zeros((LONGEST_CONTEXT, 45)), np.zeros((LONGEST_CONTEXT, 45))
    left = is_held.copy()
    for n in reversed(range(LONGEST_CONTEXT)):  # the longest one that is known speaks
        at, is_known = others[n].find(keys[n])
        asked = left & is_known & (keys[n] != 0)
        kinds = others[n].kinds[at[asked]]
        np.add.at(tried[n], kinds, 1)
        np.add.at(right[n], kinds, others[n].best[at[asked]] == tokens[asked])
        left &= ~asked
    return [(right[n][c.kinds] + 1.4 * c.times / (c.total + 1)) / (tried[n][c.kinds] + 2) for n, c in enumerate(counts)]


def _placed(keys: np.ndarray, tokens: np.ndarray, chances: np.ndarray) -> np.ndarray:
    num = 2
    while num * _FILLED < len(keys):
        num *= 2
    slots = [0] * num
    shift = 65 - num.bit_length()
    sure = np.clip(np.rint(255 * chances), 1, 255).astype(np.int64)
    for key, token, chance in zip(keys.tolist(), tokens.tolist(), sure.tolist(), strict=True):
        at = key >> shift
        while slots[at]:
            at = (at + 1) & (num - 1)
        slots[at] = (key & 0xFFFFFFFF) << 32 | token << 8 | chance
    return np.array(slots, np.uint64)
