"""Who holds which part of the cache: extents of positions, and prefixes remembered for later prompts.

Extents are powers of two, aligned to their own size (a buddy allocator), and each is contiguous: an attention kernel reads it where it
lies, and rows of equal extents often stand equally far apart, so that one kernel call serves them. A table of small pages would have
to be gathered for every layer of every forward, which on a CPU costs as much as the forward itself.

Nothing here touches keys or values; whoever owns the cache copies.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Extent", "Extents", "Prefixes"]


@dataclass(frozen=True, slots=True)
class Extent:
    """Positions from `start` on."""

    start: int
    length: int
    """A power of two."""

    @property
    def end(self) -> int:
        return self.start + self.length


class Extents:
    """The free part of a cache, handed out in powers of two."""

    def __init__(self, num_positions: int, smallest: int) -> None:
        """Both are powers of two."""
        assert num_positions & (num_positions - 1) == 0
        assert smallest & (smallest - 1) == 0
        self.num_positions = max(num_positions, smallest)
        self.smallest = smallest
        self.num_free = self.num_positions
        self._free: dict[int, set[int]] = {self.num_positions: {0}}

    def round(self, num_positions: int) -> int:
        """Positions of the extent that holds so many."""
        return max(self.smallest, 1 << (num_positions - 1).bit_length())

    def take(self, num_positions: int) -> Extent | None:
        """The lowest free extent of at least so many positions, or None."""
        wanted = self.round(num_positions)
        length = wanted
        while not self._free.get(length):
            length *= 2
            if length > self.num_positions:
                return None
        # the lowest: equal extents then stand side by side, and memory that is never reached is never touched
        start = min(self._free[length])
        self._free[length].remove(start)
        while length > wanted:
            length //= 2
            self._free.setdefault(length, set()).add(start + length)
        self.num_free -= wanted
        return Extent(start, wanted)

    def give_back(self, extent: Extent) -> None:
        """Free an extent; it joins its other half where that is free too."""
        self.num_free += extent.length
        start, length = extent.start, extent.length
        while length < self.num_positions:
            other = start ^ length
            free = self._free.get(length, set())
            if other not in free:
                break
            free.remove(other)
            start, length = min(start, other), length * 2
        self._free.setdefault(length, set()).add(start)


class Prefixes:
    """Extents of requests that are gone, kept as long as nobody needs the room: keys of a text depend on nothing but the text."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[Extent, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def num_positions(self) -> int:
        """Positions held."""
        return sum(extent.length for extent in self._tokens)

    def remember(self, extent: Extent, tokens: Sequence[int]) -> list[Extent]:
        """Keep an extent that holds the keys of these tokens. Returns the extents that are not needed any more: shorter ones of the
        same text, or the given one."""
        new = np.asarray(tokens)
        obsolete = []
        for other, known in self._tokens.items():
            common = num_common(known, new)
            if common == len(new):
                self._tokens.move_to_end(other)
                return [extent]
            if common == len(known):
                obsolete.append(other)
        for other in obsolete:
            del self._tokens[other]
        self._tokens[extent] = new
        return obsolete

    def longest(self, tokens: Sequence[int]) -> tuple[Extent | None, int]:
        """The extent that begins with most of these tokens, and how many."""
        wanted = np.asarray(tokens)
        best, most = None, 0
        for extent, known in self._tokens.items():
            common = num_common(known, wanted)
            if common > most:
                best, most = extent, common
        if best is not None:
            self._tokens.move_to_end(best)
        return best, most

    def forget_oldest(self, keep: Extent | None = None) -> Extent | None:
        """The extent that was unused longest, no longer remembered; None if there is none other than `keep`."""
        for extent in self._tokens:
            if extent != keep:
                del self._tokens[extent]
                return extent
        return None


def num_common(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that two texts share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
