"""`trimode sol`: the speed of light, what an ideal sampler would commit a forward beside what the real one does."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import progress, screen
from trimode.cli.options import Device, Dtype, Json, Quantize, Threads, given, parse, whole_number
from trimode.errors import SettingError
from trimode.viz import scores

__all__ = ["sol"]

VIEWS = ("diffusion", "self_spec")


def sol(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, directory, GGUF file or hub id.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", help="JSONL with `prompt` and `category`; built-in ones if not given."
        ),
    ] = None,
    modes: Annotated[
        str, typer.Option("--modes", metavar="LIST", help="diffusion, self_spec, or both with a comma.")
    ] = ("diffusion,self_spec"),
    block_lengths: Annotated[
        str | None, typer.Option("--block-lengths", metavar="LIST", help="With commas; the checkpoint's if not given.")
    ] = None,
    max_new_tokens: Annotated[str, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = "32",
    limit: Annotated[str | None, typer.Option("--limit", metavar="K", help="Only the first K prompts.")] = None,
    per_category: Annotated[
        str | None, typer.Option("--per-category", metavar="K", help="Only the first K prompts of each category.")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="N", help="States of a block that the search may look at, a row each.")
    ] = "128",
    threshold: Annotated[
        str | None, typer.Option("--threshold", metavar="P", help="Of the real diffusion policy (0.9 if not given).")
    ] = None,
    unmasking: Annotated[
        str | None, typer.Option("--unmasking", metavar="POLICY", help="Of the real diffusion policy.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where sol.json and its records go.")
    ] = "runs/sol",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """How fast an ideal sampler of this checkpoint would be.

    Diffusion: the fewest forwards to the text of serial denoising. Self-speculation: the fewest to the autoregressive text with a
    perfect order of drafting. Both beside the real policy. Ctrl-C keeps what was found; the same command with --resume goes on.
    """
    views = [word.strip() for word in modes.split(",") if word.strip()]
    if not views or any(word not in VIEWS for word in views):
        raise SettingError(f"--modes takes {' and '.join(VIEWS)}; got {modes!r}.")
    knobs = given({"threshold": threshold, "unmasking": unmasking})
    if knobs and "diffusion" not in views:
        raise SettingError(f"{', '.join(knobs)} are of diffusion's policy, and --modes leaves diffusion out.")
    lengths: list[int | None] = [None]
    if block_lengths is not None:
        lengths = [parse("block_length", word.strip()) for word in block_lengths.split(",") if word.strip()]
        if not lengths or 1 in lengths:
            raise SettingError(f"--block-lengths takes numbers of 2 or more; got {block_lengths!r}.")
    most = given({"max_new_tokens": max_new_tokens})["max_new_tokens"]
    states = whole_number(budget, "--budget", low=1)
    from trimode.evaluation.prompts import read_bench_prompts

    texts = read_bench_prompts(
        None if prompts is None else Path(prompts),
        limit=None if limit is None else whole_number(limit, "--limit", low=1),
    )
    if per_category is not None:
        texts = _first_of_each(texts, whole_number(per_category, "--per-category", low=1))
    runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
    asked = [
        (view, length or runner.config.block_length, number)
        for number in range(len(texts))
        for length in lengths
        for view in views
    ]
    about = {
        "model": model,
        "precision": runner.precision,
        "prompts": [t.prompt for t in texts],
        "categories": [t.category for t in texts],
        "modes": views,
        "block_lengths": [n or runner.config.block_length for n in lengths],
        "policy": knobs,
        "max_new_tokens": most,
        "budget": states,
    }
    _measure(runner, texts, asked, about, knobs, Path(output), resume=resume, json=json)


def _measure(
    runner: Any, texts: Any, asked: Any, about: Any, knobs: Any, folder: Path, *, resume: bool, json: bool
) -> None:
    from trimode.evaluation import speed_of_light as light
    from trimode.evaluation.run_folder import RunFolder

    run = RunFolder.open(folder, "lights", about, resume=resume)
    done = {(r["mode"], r["block_length"], r["prompt"]) for r in run.records}
    plan = {"max_new_tokens": about["max_new_tokens"], "budget": about["budget"]}
    partial = False
    try:
        with progress.bar(len(asked)) as advance:
            for view, length, number in asked:
                advance(f"{view}, blocks of {length}, prompt {number + 1} of {len(texts)}")
                if (view, length, number) in done:
                    continue
                ids = runner.encode(texts[number].prompt)
                own = {"block_length": length, **(knobs if view == "diffusion" else {})}
                if view == "diffusion":
                    found: list[Any] = list(light.diffusion_light(runner, ids, knobs=own, **plan))
                else:
                    found = [light.speculation_light(runner, ids, knobs=own, **plan)]
                key = {"mode": view, "block_length": length, "prompt": number, "category": texts[number].category}
                run.append({**key, "found": [light.as_record(one) for one in found]})
    except KeyboardInterrupt:
        partial = True
    flat = [{**r, **one} for r in run.records for one in r["found"]]
    rows = light.summarise_light(
        [r for r in flat if r["mode"] == "diffusion"], [r for r in flat if r["mode"] == "self_spec"]
    )
    report = {**about, "partial": partial, "results": rows, "records": run.records}
    path = run.finish("sol.json", report)
    if json:
        screen.print_json(report)
    else:
        screen.answers_console().print(scores.light_table(rows))
        screen.say(f"In {path}")
    if partial:
        screen.say(f"Stopped: {len(run.records)} of {len(asked)} are kept. The same command with --resume goes on.")
        raise typer.Exit(130)


def _first_of_each(texts: Any, count: int) -> Any:
    seen: dict[str, int] = {}
    kept = []
    for text in texts:
        seen[text.category] = seen.get(text.category, 0) + 1
        if seen[text.category] <= count:
            kept.append(text)
    return kept
