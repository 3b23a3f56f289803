"""`trimode distill`: a model's own answers, as training data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Dtype, ModelName, Quantize, Threads, given, whole_number
from trimode.cli.progress import terminated_like_ctrl_c
from trimode.errors import SettingError

__all__ = ["distill"]


def distill(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="JSONL, also gzipped: a line has `prompt` or `messages`.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The JSONL file that is written or continued.")
    ],
    model: ModelName = "smollm2-135m",
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    max_new_tokens: Annotated[
        str, typer.Option("--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
    ] = "128",
    max_prompt_tokens: Annotated[
        str, typer.Option("--max-prompt-tokens", metavar="N", help="Longer prompts are skipped and counted.")
    ] = "1024",
    limit: Annotated[str | None, typer.Option("--limit", metavar="N", help="Only the first N prompts.")] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", metavar="N", help="Prompts that share a forward.")] = "32",
    bad_lines: Annotated[
        str, typer.Option("--bad-lines", metavar="refuse|skip", help="What a line that is no prompt does.")
    ] = "refuse",
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on standard output.")] = False,
) -> None:
    """Write a model's own greedy answers to a file of prompts.

    Stopped by Ctrl-C, SIGTERM or a crash, the same command continues; answers that are there are kept, whatever options made them.
    Each line of the output is a training document with its ids.
    """
    # the options are checked before torch is imported
    tokens = given({"max_new_tokens": max_new_tokens})["max_new_tokens"]
    longest = whole_number(max_prompt_tokens, "--max-prompt-tokens", low=1)
    size = whole_number(batch_size, "--batch-size", low=1)
    most = None if limit is None else whole_number(limit, "--limit", low=1)
    if bad_lines not in ("refuse", "skip"):
        raise SettingError(f"--bad-lines is refuse or skip; got {bad_lines!r}.")
    from trimode.training.data import read_prompts

    skipped: list[str] = []
    records = read_prompts(Path(prompts), limit=most, skip=skipped.append if bad_lines == "skip" else None)
    runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
    try:
        with terminated_like_ctrl_c():
            report = run(runner, records, Path(output), tokens, longest, size)
    except KeyboardInterrupt:
        screen.say(f"Stopped; what is answered is in {output}. The same command continues.")
        raise typer.Exit(130) from None
    for line in skipped:
        screen.say(f"skipped: {line}")
    report["skipped"] += len(skipped)
    if json:
        screen.print_json(report)
    elif report["answered_before"] and not report["answers"]:
        rest = f"; {report['skipped']:,} skipped" if report["skipped"] else ""
        screen.say(f"{report['answered_before']:,} prompts are answered already and none are left{rest}, in {output}")
    else:
        screen.say(
            f"{report['answers']:,} answers, {report['tokens']:,} tokens in {report['seconds']:.0f} s, "
            f"{report['skipped']:,} skipped, in {output}"
        )


def run(runner: Any, records: Any, output: Path, max_new_tokens: int, longest: int, batch_size: int) -> dict[str, Any]:
    """Distill with a loaded model; the summary."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trimode.errors import ContextLengthError
    from trimode.training.distill import Answer, distill

    made = {"answers": 0, "tokens": 0}
    bad: list[str] = []

    def answer(batch: Any) -> list[Answer]:
        ids = [runner.encode(prompt) for prompt in batch]
        for one in ids:
            if len(one) > longest:
                raise ContextLengthError(
                    f"The prompt has {len(one):,} tokens, more than --max-prompt-tokens {longest:,}."
                )
        outputs = runner.generate(ids, mode="ar", max_new_tokens=max_new_tokens)
        made["answers"] += len(outputs)
        made["tokens"] += sum(len(one.token_ids) for one in outputs)
        return [
            Answer(prompt_ids=tuple(i), answer_ids=tuple(o.token_ids), text=o.text, finish_reason=o.finish_reason)
            for i, o in zip(ids, outputs, strict=True)
        ]

    start = time.perf_counter()
    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen.errors_console()) as progress:
        task = progress.add_task("", total=len(records), rate="")
        for done in distill(
            records, answer, output, batch_size=batch_size, on_bad=lambda n, why: bad.append(f"line {n}: {why}")
        ):
            seconds = time.perf_counter() - start
            rate = f"{made['tokens'] / seconds:.0f} tokens/s" if made["tokens"] else ""
            progress.update(task, completed=done, rate=rate)
    for line in bad:
        screen.say(f"skipped: {line}")
    return {
        **made,
        "answered_before": len(records) - made["answers"] - len(bad),
        "skipped": len(bad),
        "seconds": time.perf_counter() - start,
        "output": str(output),
    }
