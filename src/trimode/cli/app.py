"""Puts the commands together, and turns every way of ending into an exit status.

0 all went well · 2 the user's mistake, told in one line · 130 Ctrl-C · 141 whoever read our output went away.
Anything else is a bug of ours and keeps its traceback.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trimode import __version__
from trimode.cli import (
    bench,
    chat,
    convert,
    demo,
    distill,
    eval,
    generate,
    info,
    ngrams,
    screen,
    serve,
    sol,
    trace,
    train,
    tune,
)
from trimode.cli.help import HelpfulCommand, HelpfulGroup
from trimode.errors import TrimodeError, nearest

__all__ = ["app", "command", "run"]

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
PIPE_CLOSED = 141
"""128 + SIGPIPE."""

# The base of every usage error, wherever this version of typer keeps it: BadParameter is its one public child.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    cls=HelpfulGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("generate", cls=HelpfulCommand)(generate.generate)
app.command("chat", cls=HelpfulCommand)(chat.chat)
app.command("serve", cls=HelpfulCommand)(serve.serve)
app.command("info", cls=HelpfulCommand)(info.info)
app.command("demo", cls=HelpfulCommand)(demo.demo)
app.command("convert", cls=HelpfulCommand)(convert.convert)
app.command("bench", cls=HelpfulCommand)(bench.bench)
app.command("eval", cls=HelpfulCommand)(eval.evaluate)
app.command("sol", cls=HelpfulCommand)(sol.sol)
app.command("tune", cls=HelpfulCommand)(tune.tune)
app.command("trace", cls=HelpfulCommand)(trace.trace)
app.command("distill", cls=HelpfulCommand)(distill.distill)
app.command("ngrams", cls=HelpfulCommand)(ngrams.ngrams)
app.command("train", cls=HelpfulCommand)(train.train)


@app.callback(invoke_without_command=True)
def trimode(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """One checkpoint, three ways to decode: autoregressive, block diffusion and self-speculation."""
    if version:
        print(f"trimode {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def command() -> Any:
    """The whole command tree as click's objects, for running it and for writing the help pages."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run the program on `arguments`; the exit status."""
    _prepare_streams()
    tree = command()
    try:
        with tree.make_context("trimode", list(arguments)) as context:
            tree.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except TrimodeError as error:
        return _refuse(str(error))
    except UsageError as error:
        return _refuse(_usage_line(error))
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has just written ^C
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return 0


def _prepare_streams() -> None:
    """Make standard output something that can always be written to, whatever the shell has set up."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A model may write any character; a terminal that cannot show one gets a question mark, not a traceback.
        if (stream.encoding or "").lower().replace("-", "") != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def _refuse(message: str) -> int:
    print("trimode:", screen.one_line(message), file=sys.stderr)
    return 2


def _usage_line(error: Any) -> str:
    """One line for a mistake that the argument parser found: what, the nearest right thing, where to read on."""
    context = getattr(error, "ctx", None)
    message = error.format_message()
    option = getattr(error, "option_name", None)
    if option is not None and context is not None and type(error).__name__ == "NoSuchOption":
        known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        message = f"No such option: {option}.{nearest(option, [name for name in known if name.startswith('--')])}"
    path = context.command_path if context is not None else "trimode"
    if not message.endswith((".", "?")):
        message += "."
    return f"{message} See '{path} --help'."
