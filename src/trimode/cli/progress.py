"""A bar on standard error for runs of many short pieces, which end alike by Ctrl-C and by a scheduler's SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trimode.cli import screen

__all__ = ["bar", "terminated_like_ctrl_c"]


@contextmanager
def bar(total: int) -> Iterator[Callable[[str], None]]:
    """Call what this gives before each of `total` pieces, with a word on it. Nothing is drawn where no terminal is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = screen.errors_console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def advance(words: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, description=words)
            begun += 1

        with terminated_like_ctrl_c():
            yield advance


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt in here."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
