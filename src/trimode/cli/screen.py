"""What reaches the screen while a model works: loading, streaming, the line of statistics, JSON.

Answers go to standard output and nothing else does; everything said about them goes to standard error, so that a pipe
carries the answer alone.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trimode.cli.options import whole_number
from trimode.errors import SettingError
from trimode.viz import terminal

__all__ = [
    "Shown",
    "answers_console",
    "as_record",
    "errors_console",
    "is_first_rank",
    "load",
    "one_line",
    "print_json",
    "refuse_hidden_canvas",
    "say",
    "show",
    "title",
]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a streamed answer left on the screen."""

    text: str
    """All committed text that arrived."""
    output: Any
    """The library's `Generated`; None when Ctrl-C stopped the answer."""


class _Console(Console):
    """rich's console, which shows text as it stands, and leaves a reader that went away to `app.run`."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False, markup=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def answers_console() -> Console:
    """A console on standard output (made anew: whoever redirects a stream expects to be heard)."""
    return _Console(stderr=False)


def errors_console() -> Console:
    """A console on standard error."""
    return _Console(stderr=True)


def is_first_rank() -> bool:
    """Whether this process may speak and write: the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def one_line(message: str) -> str:
    """A complaint as one line of printable characters: what a file or a template says may hold a terminal's commands."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split()))


def say(message: str | Text) -> None:
    """One remark to the person at the terminal."""
    errors_console().print(message, soft_wrap=True)


def load(name: str, *, dtype: str | None, device: str | None, threads: str | None, quantize: str | None = None) -> Any:
    """Load a model, saying so while it lasts. The first thing that imports torch."""
    num_threads = None if threads is None else whole_number(threads, "--threads", low=1)
    console = errors_console()
    with console.status(f"Loading {name}") if console.is_terminal else nullcontext(), _no_garbage():
        import trimode

        return trimode.load(name, dtype=dtype, device=device, threads=num_threads, quantize=quantize)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """torch and a vocabulary are a million objects that stay: looking for garbage among them takes a sixth of the start, and later
    would take it again and again."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def title(model: Any) -> Text:
    """One line: which model this is and how it runs."""
    engine = model.forward.describe().split(",")[0]
    rest = f" · {model.num_parameters:,} parameters · {engine} on {model.device}"
    return Text.assemble((str(model.name), "bold"), (rest, "dim"))


def show(events: Any, *, canvas: bool = False, ids_only: bool = False) -> Shown:
    """Print a stream's committed text as it arrives and end its last line. Ctrl-C stops the stream and keeps the text.

    With `canvas`, the block that is being filled stands behind the text until it is committed. With `ids_only` (a
    checkpoint without a tokenizer) the ids are printed, as `--prompt-ids` takes them.
    """
    pieces: list[str] = []
    output: Any = None
    screen = _CanvasScreen() if canvas else _PlainScreen()
    try:
        with closing(events), screen:
            for event in events:
                piece = ",".join(map(str, event.token_ids)) if ids_only else event.text
                if piece and ids_only and pieces:
                    piece = f",{piece}"
                if piece:
                    pieces.append(piece)
                    screen.write(piece)
                if event.kind == "canvas":
                    screen.draw([t and f",{t}" for t in event.canvas] if ids_only else event.canvas)
                elif event.kind == "finish":  # it may bring the last of the text
                    output = event.output
    except KeyboardInterrupt:
        output = None
    return Shown("".join(pieces), output)


def refuse_hidden_canvas() -> None:
    """SettingError when there is no terminal to draw a canvas on."""
    if not sys.stdout.isatty():
        raise SettingError("The canvas needs a terminal to be drawn on; standard output is not one. Leave it off.")


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on one line of standard output; numbers that JSON cannot say become null."""
    print(json.dumps(_finite(record), ensure_ascii=False), flush=True)


def as_record(output: Any) -> dict[str, Any]:
    """A `Generated` as JSON's objects."""
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stats": output.stats.as_dict(),
    }


class _PlainScreen:
    """Text as it comes, on standard output; the last line is ended on the way out, whatever happened."""

    def __init__(self) -> None:
        self.last = "\n"
        self.guarded = sys.stdout.isatty()

    def __enter__(self) -> "_PlainScreen":
        return self

    def __exit__(self, *failure: object) -> None:
        if self.last != "\n" and failure[0] is not BrokenPipeError:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def write(self, text: str) -> None:
        self.last = text[-1]  # first: a Ctrl-C may arrive as soon as the text is out
        sys.stdout.write(terminal.harmless(text) if self.guarded else text)
        sys.stdout.flush()

    def draw(self, canvas: Any) -> None:
        pass


class _CanvasScreen:
    """Finished lines scroll away as usual; the line being written and the canvas behind it are redrawn below them."""

    def __init__(self) -> None:
        self.console = answers_console()
        # transient: when the answer ends, the live line makes way for the same line as plain text.
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.tail = ""
        self.canvas: Any = None

    def __enter__(self) -> "_CanvasScreen":
        self.live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.canvas = None
        self.live.stop()
        if self.tail:
            self.console.print(Text(self.tail))

    def write(self, text: str) -> None:
        lines, self.tail = terminal.settled(self.tail + terminal.harmless(text), self.console.width)
        for line in lines:
            self.console.print(Text(line))
        self.canvas = None  # what was tentative is now either in the text or gone
        self._redraw()

    def draw(self, canvas: Any) -> None:
        self.canvas = canvas
        self._redraw()

    def _redraw(self) -> None:
        self.live.update(terminal.canvas_view(self.tail, self.canvas), refresh=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
