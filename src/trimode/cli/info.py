"""`trimode info`: what a checkpoint is and what running it takes, from its headers alone."""

from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Json
from trimode.device import available_bytes, memory_bytes
from trimode.viz import terminal

__all__ = ["info"]


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Preset, directory, GGUF file or hub id.")],
    json: Json = False,
) -> None:
    """Tell what a checkpoint is and whether it would run here.

    Sizes, modes, parameters and the memory needed, from the headers alone: the weights are not read.
    """
    from trimode.checkpoint import describe, open_checkpoint

    facts: dict[str, Any] = describe(open_checkpoint(path))
    machine = {"memory_bytes": memory_bytes(), "available_bytes": available_bytes()}
    verdicts = {dtype: verdict(needed, **machine) for dtype, needed in facts["memory_bytes"].items()}
    if json:
        screen.print_json({**facts, "machine": machine, "runs_here": verdicts})
    else:
        page = terminal.info_page({**facts, "runs_here": verdicts}, machine)
        screen.answers_console().print(page, soft_wrap=True)


def verdict(needed: int, *, memory_bytes: int | None, available_bytes: int | None) -> str:
    """Whether something that needs `needed` bytes would run here."""
    if memory_bytes is None:
        return ""
    if needed > memory_bytes:
        return "does not fit here"
    if available_bytes is not None and needed > available_bytes:
        return "would run here with more memory free"
    return "runs here"
