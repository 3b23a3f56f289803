"""`--trace FILE`: the option that every generating command has, and the file behind it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from trimode.errors import DataError

__all__ = ["TracePath", "Tracer", "tracing"]

TracePath = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        rich_help_panel="Output",
        help="Write what each forward did, a JSON record a line; 'trimode trace FILE' shows it.",
    ),
]


class Tracer:
    """Hands the trace, if one is wanted, to whatever generates."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self._trace: Any = None

    def trace(self, model: Any) -> Any:
        """The observer that writes the file; None if none is wanted. One a command: it numbers the requests."""
        if self._file is not None and self._trace is None:
            from trimode.decoding.trace import Trace

            self._trace = Trace(self._file, model.token_text)
        return self._trace

    def observing(self, model: Any) -> dict[str, Any]:
        """The arguments that make `generate` and `stream` write it."""
        trace = self.trace(model)
        return {} if trace is None else {"observe": trace}


@contextmanager
def tracing(path: str | None) -> Iterator[Tracer]:
    """The file is opened at once, so that a path that cannot be written is told before a model is loaded."""
    if path is None:
        yield Tracer(None)
        return
    file = Path(path)
    if file.is_file() and not _may_be_replaced(file):
        raise DataError(f"{file} exists already and is no trace. Choose another file, or remove it.")
    try:
        opened = file.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"The trace cannot be written to {file}: {error.strerror}. Choose another file.") from None
    with opened:
        yield Tracer(opened)


def _may_be_replaced(file: Path) -> bool:
    """Empty, or an older trace."""
    try:
        with file.open(encoding="utf-8") as opened:
            line = opened.readline()
        return not line or {"request", "kind", "committed"} <= json.loads(line).keys()
    except (OSError, ValueError, AttributeError):
        return False
