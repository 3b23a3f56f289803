"""`self_spec` without a draft forward: what followed the last time that the text read like this is the draft.

Answers quote their prompts and repeat themselves. Where the last few tokens stood in the text before, what followed them there is
verified as drafts of the block view are, so the text is exactly the autoregressive one. Known as prompt lookup or n-gram speculation.
Where the checkpoint has a table of what it tends to say (`text.ngrams`), that speaks too. Where neither does, one token is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimode.decoding.autoregressive import causal_step, one_token
from trimode.decoding.block_diffusion import length_of_block
from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Step, Traits
from trimode.decoding.reading import Reading
from trimode.decoding.self_speculation import Draft, absorb_verification, verify_step
from trimode.decoding.settings import Settings
from trimode.text.ngrams import LONGEST_CONTEXT, NgramTable

__all__ = ["LookupSelfSpeculation", "Match", "Suggestion", "TextIndex"]

SHORTEST, LONGEST = 2, 4
"""Tokens at the end of a text that are looked for; the longer the better."""
MOST_PLACES = 16
"""That are looked at, the latest first."""
LIKELY = {2: 0.45, 3: 0.6, 4: 0.75}
"""How often what followed there follows here, by the tokens that both places have in common. Counted on Spec-Bench, and corrected for
each text by whoever weighs it."""
GOES_ON = 0.85
"""The same of a token behind one that did."""
WORTH_READING = 0.08
"""What a table of n-grams says is drafted as long as all of it is right with this chance."""


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


@dataclass(frozen=True, slots=True)
class Suggestion:
    """How a text may go on."""

    tokens: tuple[int, ...]
    chances: tuple[float, ...]
    """Of each token, behind those before it."""
    length: int
    """Tokens that the text has in common with an earlier place where its first token followed; 0: the table of n-grams says so."""

    def first(self, count: int) -> "Suggestion":
        """Its first tokens."""
        return Suggestion(self.tokens[:count], self.chances[:count], self.length)


class TextIndex:
    """Where each pair of tokens was followed by something, place behind place. The text only grows."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._before: list[int] = [0] * SHORTEST
        """For each place the one before it that follows the same pair; 0: none does."""
        self._num_read = -1
        self._found: Match | None = None
        self.suggested: tuple[tuple[int, int], Suggestion | None] = ((-1, 0), None)
        """What was made of it last: for a text of so many tokens at most so many."""

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
    """Verify what the text itself, or a table of n-grams, suggests, in one forward a round."""

    def __init__(self, ngrams: NgramTable | None = None) -> None:
        self._ngrams = None if ngrams is None else ngrams.reader()

    def suggest(self, g: Generation, most: int) -> Suggestion | None:
        """At most so many tokens, if they can be verified next: a prompt is read first, and where one token is left a draft would save
        nothing."""
        if len(g.uncached) != 1 or g.cached < len(g.prompt) or g.num_left < 2 or most < 1:
            return None
        if g.index is None:
            g.index = TextIndex()
        index: TextIndex = g.index
        (num_read, longest), found = index.suggested
        if num_read != len(g.final) or longest < most:
            match = index.match(g.final)
            quoted = [] if match is None else match.drafts(g.final, most)
            found = self._joined(g.final, quoted, 0 if match is None else match.length, most)
            index.suggested = ((len(g.final), most), found)
        return found if found is None or len(found.tokens) <= most else found.first(most)

    def _joined(self, text: list[int], quoted: list[int], length: int, most: int) -> Suggestion | None:
        """What followed before, unless there is nothing or the table knows better how it begins: then what the table says."""
        end = text[-LONGEST_CONTEXT:]
        told = None if self._ngrams is None else self._ngrams.following(end)
        if quoted and (told is None or told[0] == quoted[0] or told[1] <= LIKELY[length]):
            first = LIKELY[length] if told is None or told[0] != quoted[0] else max(told[1], LIKELY[length])
            return Suggestion(tuple(quoted), (first, *[GOES_ON] * (len(quoted) - 1)), length)
        tokens: list[int] = []
        chances: list[float] = []
        together = 1.0
        while told is not None and len(tokens) < most and (together := together * told[1]) >= WORTH_READING:
            tokens.append(told[0])
            chances.append(told[1])
            end.append(told[0])
            told = self._ngrams.following(end) if self._ngrams is not None else None
        return Suggestion(tuple(tokens), tuple(chances), 0) if tokens else None

    def plan_one(self, g: Generation) -> Step:
        if g.state is None:
            count = min(length_of_block(g), g.num_left) - 1
            found = self.suggest(g, count)
            if found is None:
                return causal_step(g, "decode")
            g.canvas, g.state = list(found.tokens), Draft()
        return verify_step(g)

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        if g.state is None:
            return one_token(g, predictions.after, len(step.tokens))
        return absorb_verification(g, predictions.after)

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return settings.block_length or traits.block_length
