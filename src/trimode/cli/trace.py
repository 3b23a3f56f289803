"""`trimode trace`: a written trace, played in the terminal or turned into a page."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from trimode.cli import screen
from trimode.cli.options import Json, whole_number
from trimode.errors import DataError, SettingError

__all__ = ["trace"]

SHORTEST_S, LONGEST_S = 0.04, 1.0
"""How long one forward stands on the screen, whatever it took."""


def trace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What --trace wrote.")],
    request: Annotated[
        str | None,
        typer.Option("--request", metavar="N", help="Only this request of the file, from 0; all if not given."),
    ] = None,
    speed: Annotated[
        str, typer.Option("--speed", metavar="X", help="Times the speed at which it was made; 0 prints it at once.")
    ] = "1",
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write one self-contained page; nothing is played."),
    ] = None,
    json: Json = False,
) -> None:
    """Show how an answer came about: what each forward drafted, committed, rejected, revised and cost.

    On a terminal the answer is played as it was made; in a pipe each forward is one line.
    """
    pace = _speed(speed)
    if json and html is not None:
        raise SettingError("--json and --html are two kinds of output. Give one of them.")
    number = None if request is None else whole_number(request, "--request", low=0)
    from trimode.viz import replay as viz

    replay = viz.read_trace(Path(file))
    if number is not None:
        if number not in replay.requests:
            raise SettingError(f"{file} has no request {number}; it has 0 to {max(replay.requests)}.")
        replay.requests = {number: replay.requests[number]}
    if html is not None:
        try:
            Path(html).write_text(viz.page(replay, Path(file).name), encoding="utf-8")
        except OSError as error:
            raise DataError(f"The page cannot be written to {html}: {error.strerror}. Choose another file.") from None
        screen.say(f"In {html}")
        return
    if json:
        screen.print_json({"requests": [_summary(n, forwards) for n, forwards in replay.requests.items()]})
        return
    console = screen.answers_console()
    for n, forwards in replay.requests.items():
        summary = _summary(n, forwards)
        told = f"request {n} · {summary['tokens']} tokens · {summary['forwards']} forwards · {summary['seconds']:.2f} s"
        console.print(Text(told, style="bold"), soft_wrap=True)
        if console.is_terminal and pace > 0:
            _play(console, viz, replay, forwards, pace)
        else:
            for i, forward in enumerate(forwards, 1):
                console.print(viz.forward_line(replay, i, forward), soft_wrap=True)
    if not console.is_terminal or pace == 0:
        screen.say(Text("+ committed  - rejected  ~ revised  [ ] tentative, ░ masked", style="dim"))


def _play(console: Any, viz: Any, replay: Any, forwards: list[Any], pace: float) -> None:
    with Live(console=console, auto_refresh=False) as live:
        for i, forward in enumerate(forwards, 1):
            start = time.monotonic()
            line = viz.forward_line(replay, i, forward)
            line.no_wrap, line.overflow = True, "ellipsis"
            live.update(Group(viz.standing(replay, forwards[:i]), Text(), line), refresh=True)
            pause = min(max(forward.seconds / pace, SHORTEST_S / pace), LONGEST_S)
            time.sleep(max(0.0, pause - (time.monotonic() - start)))


def _summary(number: int, forwards: list[Any]) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for forward in forwards:
        kinds[forward.kind] = kinds.get(forward.kind, 0) + 1
    return {
        "request": number,
        "tokens": sum(len(f.committed) for f in forwards),
        "forwards": len(forwards),
        "seconds": sum(f.seconds for f in forwards),
        "kinds": kinds,
        "rejected": sum(len(f.rejected) for f in forwards),
        "revised": sum(len(f.revised) for f in forwards),
    }


def _speed(written: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise SettingError(f"--speed must be a number of 0 or more; got {written!r}.")
    return value
