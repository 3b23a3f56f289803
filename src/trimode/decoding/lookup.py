"""`self_spec` without a draft forward: what followed the last time that the text read like this is the draft.

Answers quote their prompts and repeat themselves. Where the last few tokens stood in the text before, what followed them there is
verified as drafts of the block view are, so the text is exactly the autoregressive one. Where they did not, one token is decoded. Known
as prompt lookup or n-gram speculation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimode.decoding.autoregressive import causal_step, one_token
from trimode.decoding.block_diffusion import length_of_block
from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Step, Traits
from trimode.decoding.reading import Reading
from trimode.decoding.self_speculation import Draft, absorb_verification, verify_step
from trimode.decoding.settings import Settings

__all__ = ["LookupSelfSpeculation", "Match", "TextIndex"]

SHORTEST, LONGEST = 2, 4
"""Tokens at the end of a text that are looked for; the longer the better."""
MOST_PLACES = 16
"""That are looked at, the latest first."""


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
    """Where each pair of tokens was followed by something, place behind place. The text only grows."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._before: list[int] = [0] * SHORTEST
        """For each place the one before it that follows the same pair; 0: none does."""
        self._num_read = -1
        self._found: Match | None = None

    def match(self, text: Sequence[int]) -> Match | None:
        """Of the latest places that follow the pair that this text ends with, the one with the longest run before it."""
        if len(text) == self._num_read:
            return self._found
        latest, before = self._latest, self._before
        for i in range(len(before), len(text)):
            pair = (text[i - 2], text[i - 1])
            before.append(latest.get(pair, 0))
            latest[pair] = i
        self._num_read = len(text)
        self._found = self._longest(text) if len(text) >= SHORTEST else None
        return self._found

    def _longest(self, text: Sequence[int]) -> Match | None:
        start = self._latest.get((text[-2], text[-1]), 0)
        longest, found = 0, 0
        for _ in range(MOST_PLACES):
            if start == 0 or longest == LONGEST:
                break
            length = SHORTEST
            while length < min(LONGEST, start) and text[start - length - 1] == text[-length - 1]:
                length += 1
            if length > longest:
                longest, found = length, start
            start = self._before[start]
        return Match(longest, found) if found else None


class LookupSelfSpeculation(OneByOne):
    """Verify what the text itself suggests, in one forward a round."""

    def match(self, g: Generation) -> Match | None:
        """What the text so far suggests, if that can be verified next: a prompt is read first, and where one token is left a draft
        would save nothing."""
        if len(g.uncached) != 1 or g.cached < len(g.prompt) or g.num_left < 2:
            return None
        if g.index is None:
            g.index = TextIndex()
        return g.index.match(g.final)

    def plan_one(self, g: Generation) -> Step:
        if g.state is None:
            match = self.match(g)
            count = min(length_of_block(g), g.num_left) - 1
            if match is None or count < 1:
                return causal_step(g, "decode")
            g.canvas, g.state = match.drafts(g.final, count), Draft()
        return verify_step(g)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        if g.state is None:
            return one_token(g, predictions.after, len(step.tokens))
        return absorb_verification(g, predictions.after)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length
