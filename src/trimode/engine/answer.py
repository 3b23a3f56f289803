"""One generation with what is known of its text and time: ids become text as they become final, and stop strings end it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from trimode.decoding.interface import Generation
from trimode.engine.request import Stats, StreamEvent, make_stats
from trimode.text.stream import StopMatcher, TextStream
from trimode.text.tokenizer import Tokenizer

__all__ = ["Answer", "AnswerText"]


class AnswerText:
    """A generation's text as it becomes certain; knows stop strings."""

    def __init__(self, tokenizer: Tokenizer | None, generation: Generation) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopMatcher(generation.settings.stop) if generation.settings.stop else None
        self._pieces: list[str] = []
        self._taken = 0
        self._ended = False

    def push(self, token: int) -> bool:
        """Take one more final token; True if a stop string is now complete."""
        return self._show(self._stream.push(token) if self._stream is not None else "")

    def _show(self, piece: str) -> bool:
        stopped = False
        if self._stops is not None:
            piece, stopped = self._stops.push(piece)
        self._pieces.append(piece)
        return stopped

    def finish(self) -> bool:
        """Let go of what was held back; True if that completes a stop string."""
        if self._ended:
            return False
        self._ended = True
        stopped = self._stream is not None and self._show(self._stream.finish())
        if self._stops is not None:
            self._pieces.append(self._stops.finish())
        return stopped

    def take(self) -> str:
        """What became certain since the last call."""
        new = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return new

    def whole(self) -> str:
        """All of it."""
        return "".join(self._pieces)


@dataclass(slots=True, eq=False)
class Answer:
    """A prompt on its way, its text, and when what happened."""

    generation: Generation
    mode: str
    text: AnswerText
    notice: str | None
    spans: Sequence[range] | None = None
    """Of a text to fill in: the places that are missing."""
    start: float = field(default_factory=time.perf_counter)
    """When the request came, by the performance counter."""
    first_token_s: float | None = None
    seconds: float | None = None
    _num_sent: int = 0
    _last_canvas: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Note the time of what the last forward did."""
        now = time.perf_counter() - self.start
        if self.first_token_s is None and self.generation.num_new:
            self.first_token_s = now
        if self.seconds is None and self.generation.finish_reason is not None:
            self.seconds = now
            if self.text.finish():
                self.generation.finish_reason = "stop"

    def news(self, name_token: Callable[[int], str | None] | None = None) -> Iterator[StreamEvent]:
        """What is new since the last call; with `name_token` the tentative block too, token by token."""
        g = self.generation
        text = self.text.take()
        new = g.final[len(g.prompt) + self._num_sent :]
        self._num_sent += len(new)
        if text or new:
            told = tuple(g.logprobs[self._num_sent - len(new) : self._num_sent])
            yield StreamEvent(kind="text", text=text, token_ids=tuple(new), logprobs=told)
        if name_token is not None and g.finish_reason is None and g.canvas != self._last_canvas:
            self._last_canvas = list(g.canvas)
            yield StreamEvent(kind="canvas", canvas=[name_token(t) for t in g.canvas])

    def stats(self) -> Stats:
        """What it cost so far."""
        g = self.generation
        return make_stats(
            self.generation,
            self.mode if not g.choices else "ar" if set(g.choices) == {"ar"} else "self_spec",
            seconds=self.seconds or 0.0,
            first=self.first_token_s,
            notice=self.notice,
            spans=self.spans,
        )
