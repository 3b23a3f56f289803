"""A bar on standard error for runs of many short pieces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trimode.cli import screen

__all__ = ["bar"]


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

        yield advance
