"""What one forward is given: the packed inputs of all its rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimode.model.attention import Span

__all__ = ["Inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All rows of a forward, packed behind one another."""

    tokens: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    """Which inputs are one row's, and where in the cache they go."""
    adapted: Sequence[int] = ()
    """Inputs that the adapter acts on."""
    asked: Sequence[int] = ()
    """Inputs whose logits are wanted, in this order."""
