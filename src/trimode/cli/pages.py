"""Writes `docs/commands.md`, the help page of every command: `python -m trimode.cli.pages docs/commands.md`."""

import sys
from pathlib import Path

from trimode.cli.app import command
from trimode.cli.help import WIDEST, group_page, page

__all__ = ["pages"]


def pages() -> str:
    """The document: every help page, as a terminal of the full width shows it."""
    program = command()
    parts = [
        "# Commands",
        "Written by `make docs` from the program's own help pages; a test keeps it current.",
        f"```text\n{group_page(program, 'trimode', WIDEST)}\n```",
    ]
    for name, one in program.commands.items():
        parts += [f"## trimode {name}", f"```text\n{page(one, f'trimode {name}', WIDEST)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(pages(), encoding="utf-8")
