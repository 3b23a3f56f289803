"""`trimode demo`: the same question in every mode, and what each answer cost."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from trimode.cli import screen
from trimode.cli.modes import modes_of
from trimode.cli.options import Device, Dtype, Json, ModelName, Quantize, Threads, given
from trimode.cli.tracing import TracePath, Tracer, tracing
from trimode.errors import PromptError
from trimode.viz import terminal

__all__ = ["demo"]

MODES = ("ar", "diffusion", "self_spec", "auto")
LEGEND = "forwards: those that read the prompt + those that made the answer; tokens/forward counts the latter"


def demo(
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", rich_help_panel="Prompt", help="The question.")
    ] = "Why is the sky blue?",
    max_new_tokens: Annotated[
        str,
        typer.Option("--max-new-tokens", metavar="N", rich_help_panel="Prompt", help="Longest answer, in tokens."),
    ] = "64",
    model: ModelName = "smollm2-135m",
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    trace: TracePath = None,
) -> None:
    """Ask one question in every mode and compare the costs."""
    limit = given({"max_new_tokens": max_new_tokens})["max_new_tokens"]
    if not prompt:
        raise PromptError("The prompt is empty. Give some text.")
    with tracing(trace) as tracer:
        runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
        _compare(runner, prompt, limit, tracer, json=json)


def _compare(runner: Any, prompt: str, limit: int, tracer: Tracer, *, json: bool) -> None:
    # Whatever is set up on first use (threads, buffers) is no mode's cost.
    runner.generate(prompt, mode="ar", max_new_tokens=2)
    runner.measure()

    console = screen.answers_console()
    if not json:
        console.print(screen.title(runner), soft_wrap=True)
        console.print(Text(f"> {prompt}"), soft_wrap=True)
    modes = modes_of(runner, MODES, "it answers in ar and auto. trimode convert gives it the rest")
    outputs: dict[str, Any] = {}
    told: set[str] = set()
    for mode in modes:
        notice = runner.notice(mode)
        if json:
            outputs[mode] = runner.generate(prompt, mode=mode, max_new_tokens=limit, **tracer.observing(runner))
            continue
        console.print()
        console.print(Text(f"── {mode} ──", style="bold cyan"))
        if notice and notice not in told:
            told.add(notice)  # what holds for two modes is said once
            console.print(Text(notice, style="dim italic"), soft_wrap=True)
        shown = screen.show(runner.stream(prompt, mode=mode, max_new_tokens=limit, **tracer.observing(runner)))
        if shown.output is None:
            raise typer.Exit(130)
        outputs[mode] = shown.output

    exact = [
        mode for mode in modes if mode == "self_spec" or (mode == "auto" and runner.auto.get("mode") != "diffusion")
    ]
    equal = {mode: list(outputs[mode].token_ids) == list(outputs["ar"].token_ids) for mode in exact}
    same = all(equal.values())
    if json:
        runs = [{"mode": mode, **screen.as_record(outputs[mode]), "notice": runner.notice(mode)} for mode in modes]
        verdicts = {f"{mode}_equals_ar": equal.get(mode) for mode in ("self_spec", "auto")}
        screen.print_json({"model": runner.name, "prompt": prompt, "runs": runs, **verdicts})
        return
    console.print()
    console.print(terminal.demo_table([{**outputs[mode].stats.as_dict(), "mode": mode} for mode in modes]))
    console.print(Text(LEGEND, style="dim"), soft_wrap=True)
    console.print()
    console.print(Text(equality(exact, same, runner.precision, runner.rows_stand_alone)), soft_wrap=True)
    if "auto" not in exact:
        console.print(Text("auto was tuned to diffusion here, whose text may be another."), soft_wrap=True)


def equality(modes: Sequence[str], same: bool, precision: str, rows_stand_alone: bool) -> str:
    """The closing line: are the texts of these modes that of `ar`?"""
    if same:
        texts = {1: f"{modes[0]}'s text equals", 2: f"{modes[0]}'s text and {modes[-1]}'s equal"}[len(modes)]
        return f"{texts} ar's, token for token."
    differs = f"The text of {' or '.join(modes)} differs from ar's"
    if rows_stand_alone:
        return f"{differs}. In {precision} on this engine that is a bug; please report it."
    return f"{differs}: in {precision} two choices may tie within rounding. In float32 they agree."
