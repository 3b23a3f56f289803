"""`trimode generate`: one prompt, one answer."""

import sys
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Dtype, Json, ModelName, Quantize, Stats, Threads, given, takes_knobs
from trimode.cli.tracing import TracePath, tracing
from trimode.errors import PromptError, SettingError
from trimode.viz import terminal

__all__ = ["generate"]


@takes_knobs
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; - reads it from standard input.")
    ] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(
            "--prompt-ids",
            metavar="IDS",
            rich_help_panel="Prompt",
            help="The prompt as token ids, such as 1,2,3. A checkpoint without a tokenizer answers in ids too.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", rich_help_panel="Prompt", help="A system message before the prompt."),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", rich_help_panel="Prompt", help="Continue the prompt as it stands, without a template."),
    ] = False,
    model: ModelName = "smollm2-135m",
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    stats: Stats = None,
    canvas: Annotated[
        bool,
        typer.Option("--canvas", rich_help_panel="Output", help="Show the block that is being filled, as it fills."),
    ] = False,
    trace: TracePath = None,
    **knobs: Any,
) -> None:
    """Answer one prompt, printing the text as it is committed.

    The answer goes to standard output, the line of statistics to standard error.
    """
    settings = given(knobs)
    if json and canvas:
        raise SettingError("--canvas has no effect with --json. Leave one of them out.")
    if json and stats is not None:
        raise SettingError("--json always tells the statistics. Leave out --stats and --no-stats.")
    if canvas:
        if settings.get("mode") == "ar":
            raise SettingError("--canvas has no effect in mode ar, which has no blocks. Leave it out.")
        screen.refuse_hidden_canvas()
    asked = _prompt(prompt, prompt_ids, system, raw)
    with tracing(trace) as tracer:
        runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
        settings |= tracer.observing(runner)
        _answer(runner, asked, settings, raw=raw, json=json, stats=stats, canvas=canvas)


def _answer(
    runner: Any, asked: Any, settings: dict[str, Any], *, raw: bool, json: bool, stats: bool | None, canvas: bool
) -> None:
    if json:
        output = runner.generate(asked, raw=raw, **settings)
        screen.print_json(screen.as_record(output))
        return
    ids_only = runner.tokenizer is None
    shown = screen.show(
        runner.stream(asked, raw=raw, canvas=canvas, **settings),
        canvas=canvas,
        ids_only=ids_only,
    )
    if shown.output is None:
        raise typer.Exit(130)
    if stats is not False:
        spent = shown.output.stats.as_dict()
        if spent.get("notice"):
            screen.say(spent["notice"])
        screen.say(terminal.stats_line(spent, shown.output.finish_reason))


def _prompt(prompt: str | None, prompt_ids: str | None, system: str | None, raw: bool) -> Any:
    """What the library is asked: a text, messages, or ids. Raises PromptError or SettingError."""
    if prompt is not None and prompt_ids is not None:
        raise SettingError("A prompt and --prompt-ids are two prompts. Give one of them.")
    if prompt_ids is not None:
        for name, used in (("--system", system is not None), ("--raw", raw)):
            if used:
                raise SettingError(f"{name} has no effect on --prompt-ids: ids are taken as they stand. Leave it out.")
        return _ids(prompt_ids)
    if prompt is None:
        raise PromptError("There is no prompt. Give a text, - to read standard input, or --prompt-ids.")
    if raw and system is not None:
        raise SettingError("--system has no effect with --raw: a raw prompt has no roles. Leave one of them out.")
    text = _read_stdin(keep_last_newline=raw) if prompt == "-" else prompt
    if not text:
        where = "Standard input" if prompt == "-" else "The prompt"
        raise PromptError(f"{where} is empty. Give some text.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError("The prompt is not UTF-8 text.") from None
    if system is None:
        return text
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.strip().strip("[]").split(",")]
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise PromptError(f"--prompt-ids must be whole numbers with commas, such as 1,2,3; got {text!r}.")
    return [int(part) for part in parts]


def _read_stdin(*, keep_last_newline: bool) -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("Standard input is closed, so there is no prompt to read from it.")
    if sys.stdin.isatty():
        screen.say("Type the prompt, then Ctrl-D.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise PromptError("Standard input is not UTF-8 text.") from None
    # `echo question | trimode generate -` asks the question without the line break that echo adds.
    return text if keep_last_newline else text.removesuffix("\n").removesuffix("\r")
