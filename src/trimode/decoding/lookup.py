"""`self_spec` without a draft forward: what followed the last time that the text read like this is the draft.

Answers quote their prompts and repeat themselves. Where the last few tokens stood in the text before, what followed them there is
verified as drafts of the block view are, so the text is exactly the autoregressive one. Where they did not, one token is decoded. Known
as prompt lookup or n-gram speculation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from trimode.decoding.autoregressive import causal_step
from trimode.decoding.block_diffusion import length_of_block
from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Step, Traits
from trimode.decoding.self_speculation import Draft, absorb_verification, one_token, verify_step
from trimode.decoding.settings import Settings

__all__ = ["LookupSelfSpeculation", "Match", "TextIndex"]

SHORTEST, LONGEST = 2, 4
"""Tokens at the end of a text that are looked for; the longer the better."""


@dataclass(frozen=True, slots=True)
class Match:
    """Where a text read before as it ends now."""

    length: int
    """Tokens that both places have in common, as far as was looked."""
    start: int
    """What followed there begins here."""

    def drafts(self, text: Sequence[int], count: int) -> list[int]:
        """What followed; where the text ends, what would follow if it went on like this."""
        found: list[int] = []
        for i in range(self.start, self.start + count):
            found.append(text[i] if i < len(text) else found[i - len(text)])
        return found


class TextIndex:
    """Where runs of a few tokens were last followed by something. The text only grows."""

    def __init__(self) -> None:
        self._places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(SHORTEST, LONGEST + 1)}
        self._num_known = 0

    def match(self, text: Sequence[int]) -> Match | None:
        """The latest place with the longest run that this text ends with."""
        for n, places in self._places.items():
            for i in range(max(self._num_known, n), len(text)):
                places[tuple(text[i - n : i])] = i
        self._num_known = len(text)
        for n in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            start = self._places[n].get(tuple(text[-n:]))
            if start is not None:
                return Match(n, start)
        return None


class LookupSelfSpeculation(OneByOne):
    """Verify what the text itself suggests, in one forward a round."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Generation, TextIndex] = WeakKeyDictionary()

    def match(self, g: Generation) -> Match | None:
        """What the text so far suggests, if that can be verified next: a prompt is read first, and where one token is left a draft
        would save nothing."""
        if len(g.uncached) != 1 or g.cached < len(g.prompt) or g.num_left < 2:
            return None
        index = self._indices.get(g)
        if index is None:
            index = self._indices[g] = TextIndex()
        return index.match(g.final)

    def plan_one(self, g: Generation) -> Step:
        if g.state is None:
            match = self.match(g)
            count = min(length_of_block(g), g.num_left) - 1
            if match is None or count < 1:
                return causal_step(g, "decode")
            g.canvas, g.state = match.drafts(g.final, count), Draft()
        return verify_step(g)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Outcome:
        if g.state is None:
            return one_token(g, predictions.after, len(step.tokens))
        return absorb_verification(g, predictions.after)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length
