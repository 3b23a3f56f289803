"""Text that arrives token by token: what can be shown already, and where a stop string ends it.

Ids and characters do not line up: one token may be half an emoji, and what a token prints can depend on its neighbours.
The one idea: show only what no later token can change, so nothing shown is ever taken back.
"""

import codecs
from collections.abc import Sequence

from trimode.errors import SettingError
from trimode.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "TextStream"]

_LONGEST_TAIL = 8
"""Tokens that an unfinished character may take: UTF-8 needs at most 4 bytes, the rest is margin."""


class TextStream:
    """Turns ids, pushed one at a time, into pieces of text.

    The law: the pieces joined, and then what `finish` returns, are `tokenizer.decode(ids)` of all ids pushed. A push
    costs the same at the end of a long text as at its start. One stream serves one text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._pieces = _BytePieces(tokenizer) if tokenizer.is_byte_level else _WindowPieces(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; never half a character, often empty."""
        # Left out before anything else, as decode does: a skipped token is no neighbour of its neighbours.
        return "" if token_id in self._skipped else self._pieces.push(token_id)

    def finish(self) -> str:
        """The text that was held back: an unfinished character shows as U+FFFD. Call it once, after the last push."""
        return self._pieces.finish()


class _BytePieces:
    """Byte-level vocabularies: every token is bytes, and the text is their UTF-8 reading."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        # Python and the tokenizers library agree on how many U+FFFD broken bytes become: one for each longest piece
        # that could have begun a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id) or b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowPieces:
    """All other vocabularies: decode the last shown tokens with and without the new ones; the difference is new.

    The shown tokens give the new ones their left neighbours (SentencePiece drops a text's first space, WordPiece puts
    one between words) without decoding the whole text again.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        if self._tokenizer.id_to_token(token_id) is None:  # decode prints nothing for it either
            return ""
        self._waiting.append(token_id)
        # A run of byte tokens is read as a whole: one broken byte at its end turns all of it to U+FFFD, complete
        # characters too. So nothing of it is certain before another token closes it.
        if self._tokenizer.is_byte_fallback(token_id):
            return ""
        text = self._waiting_text()
        # A decoder of unknown make may read bytes too. No character is longer than this; what is still unreadable then
        # is taken to be broken, the one place where the law holds for valid UTF-8 only.
        if text.endswith("\ufffd") and len(self._waiting) < _LONGEST_TAIL:
            return ""
        if text:
            self._shown = self._waiting
        elif len(self._shown) < _LONGEST_TAIL:
            # Prints nothing yet may count later: "▁" at the start is dropped, but it is the space that gets dropped.
            self._shown += self._waiting
        self._waiting = []
        return text

    def finish(self) -> str:
        text = self._waiting_text() if self._waiting else ""
        self._shown, self._waiting = self._waiting or self._shown, []
        return text

    def _waiting_text(self) -> str:
        # Special tokens were left out before; those that arrive here are to be seen.
        before = self._tokenizer.decode(self._shown, skip_special_tokens=False)
        return self._tokenizer.decode(self._shown + self._waiting, skip_special_tokens=False)[len(before) :]


class StopMatcher:
    """Cuts a text, pushed in pieces, at the first stop string.

    The stop string that is complete first wins, whatever the pieces; of several that end together the longest wins. The
    stop string itself is not shown.

    Raises SettingError for an empty stop string, or when `stops` is one string instead of several.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str):
            raise SettingError(f"stop strings must be a list of strings; got the string {stops!r}. Use [{stops!r}].")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise SettingError(f"a stop string must be a string of at least one character; got {stop!r}.")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now safe to show, and whether a stop string was hit; after a hit nothing more is shown."""
        if self._hit:
            return "", True
        # What is held contains every stop string that has begun, so the search never looks further back.
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self._held, self._hit = "", True
            return text[:start], True
        certain = len(text) - self._num_held(text)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """The text held back because a stop string might have begun in it. Call it once, after the last push."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
