"""Help pages as plain text, the same on the screen and in `docs/commands.md`.

A page is laid out from the command's own parameters, so it cannot go stale, and it looks the same whichever version of
the argument parser is installed.
"""

import shutil
import textwrap
from typing import Any

import typer.core

from trimode.errors import SettingError, nearest

__all__ = ["HelpfulCommand", "HelpfulGroup", "group_page", "page"]

WIDEST = 100
"""Columns beyond which lines are tiring to read, however wide the terminal."""
LEFT_COLUMN = 30
"""Columns for an option's names; longer ones push their text to the next line."""


class HelpfulCommand(typer.core.TyperCommand):
    """A command whose `--help` is our page."""

    def get_help(self, ctx: Any) -> str:
        return page(self, ctx.command_path, _terminal_width())


class HelpfulGroup(typer.core.TyperGroup):
    """The program itself: lists its commands, and suggests one for a mistyped name."""

    def get_help(self, ctx: Any) -> str:
        return group_page(self, ctx.command_path, _terminal_width())

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order in which they were written down, which is the order of use

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            known = ", ".join(self.commands)
            raise SettingError(f"No such command: {args[0]}.{nearest(args[0], self.commands)} There are {known}.")
        return super().resolve_command(ctx, args)


def page(command: Any, path: str, width: int) -> str:
    """The help page of one command: usage, what it does, arguments, then the options group by group."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    groups: dict[str, list[tuple[str, str]]] = {}
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden:
            panel = getattr(option, "rich_help_panel", None) or "Options"
            groups.setdefault(panel, []).append((_names(option), _help(option)))
    # --help is an option that the parser adds by itself.
    last = next(reversed(groups), "Options")
    groups.setdefault(last, []).append(("--help, -h", "Show this page and leave."))

    usage = " ".join([path, "[OPTIONS]", *(a.metavar for a in arguments)])
    lines = [f"Usage: {usage}", "", *_paragraphs(command.help or "", width)]
    explained = [(a.metavar.strip("[]"), _help(a)) for a in arguments]
    column = _column([row for rows in (explained, *groups.values()) for row in rows])
    if arguments:
        lines += ["", *_rows(explained, column, width)]
    for panel, rows in groups.items():
        lines += ["", f"{panel}:", *_rows(rows, column, width)]
    return "\n".join(lines)


def group_page(group: Any, path: str, width: int) -> str:
    """The help page of the program: usage, what it is, and its commands in a line each."""
    commands = [(name, (c.help or "").split("\n")[0]) for name, c in group.commands.items() if not c.hidden]
    options = [(_names(p), _help(p)) for p in group.params if p.param_type_name == "option" and not p.hidden]
    options.append(("--help, -h", "Show this page and leave; 'trimode COMMAND --help' tells about a command."))
    lines = [f"Usage: {path} COMMAND [OPTIONS]", "", *_paragraphs(group.help or "", width)]
    column = _column([*commands, *options])
    lines += ["", "Commands:", *_rows(commands, column, width), "", "Options:", *_rows(options, column, width)]
    return "\n".join(lines)


def _names(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar}"


def _help(parameter: Any) -> str:
    text = parameter.help or ""
    default = parameter.default
    shown = default not in (None, "", [], ()) and not isinstance(default, bool) and not callable(default)
    return f"{text} [{default}]" if shown else text


def _paragraphs(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False), ""]
    return lines[:-1]


def _column(rows: list[tuple[str, str]]) -> int:
    """Where the second column starts, the same on the whole page; a name too wide for it stands on its own line."""
    return max(width for name, _ in rows if (width := len(name) + 4) <= LEFT_COLUMN)


def _rows(rows: list[tuple[str, str]], column: int, width: int) -> list[str]:
    """Two columns: a name, and its text wrapped beside it."""
    lines: list[str] = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - column, 20), break_on_hyphens=False)
        if len(name) + 4 > column:
            lines.append(f"  {name}")
        elif wrapped:
            lines.append(f"  {name:<{column - 2}}{wrapped.pop(0)}")
        else:
            lines.append(f"  {name}")
        lines += [" " * column + line for line in wrapped]
    return lines


def _terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
