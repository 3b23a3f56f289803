"""`trimode info`: what a checkpoint is and what running it takes, from its headers alone."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Json
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


def memory_bytes() -> int | None:
    """Memory that this machine, or the container that we run in, has in all; None where the system does not say."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and some systems lack the names
        return None
    limit = _control_group("memory.max")
    return installed if limit is None else min(installed, limit)


def available_bytes() -> int | None:
    """Memory that a new process could take right now; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    return available if limit is None or used is None else min(available, max(limit - used, 0))


def _control_group(name: str) -> int | None:
    """A number of the Linux control group that a container sees as its own; None without one or without a limit."""
    file = Path("/sys/fs/cgroup") / name
    try:
        text = file.read_text().strip()
    except OSError:  # no control groups here, or not ours to read
        return None
    return int(text) if text.isdigit() else None
