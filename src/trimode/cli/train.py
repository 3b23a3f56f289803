"""`trimode train`: run a recipe."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Threads, whole_number

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file; recipes/ holds examples.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The run's folder; the same again continues.")
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value, such as train.steps=100.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on standard output.")] = False,
) -> None:
    """Train by a recipe: an adapter that makes an autoregressive model tri-mode, its own text untouched.

    Ctrl-C or SIGTERM saves and ends; the same command continues, bit for bit.
    """
    num_threads = None if threads is None else whole_number(threads, "--threads", low=1)
    # torch is imported from here on
    from trimode.training.recipe import read_recipe

    settings = read_recipe(Path(recipe), changes or [])
    summary = run(settings, Path(output), device, num_threads)
    if json:
        screen.print_json(summary)
    else:
        screen.say(json_module.dumps(summary))


def run(recipe: Any, output: Path, device: str | None, threads: int | None) -> dict[str, Any]:
    """Train as the recipe says and write what came of it; the summary."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from trimode.checkpoint import open_checkpoint
    from trimode.device import pick_device, set_threads
    from trimode.model.transformer import Transformer
    from trimode.training.convert import (
        DTYPES,
        Held,
        export_adapter,
        make_model,
        make_objective,
        split_held_out,
        take_adapter,
    )
    from trimode.training.data import Mixture, read_documents
    from trimode.training.encode import make_encode
    from trimode.training.run_state import RunDirectory
    from trimode.training.trainer import Interrupted
    from trimode.training.trainer import train as train_model

    set_threads(threads)
    target = pick_device(device)
    checkpoint = open_checkpoint(recipe.base)
    run_directory = RunDirectory(output, identity=recipe.identity())
    encode = make_encode(checkpoint)
    skipped: list[str] = []
    skip = skipped.append if recipe.data.bad_lines == "skip" else None
    sources = [
        (
            read_documents(
                Path(source.path),
                encode,
                max_tokens=recipe.data.max_tokens,
                vocab_size=checkpoint.config.vocab_size,
                skip=skip,
            ),
            source.weight,
        )
        for source in recipe.data.sources
    ]
    if skipped:
        screen.say(f"{len(skipped)} lines skipped; the first: {skipped[0]}")
    first, held = split_held_out(sources[0][0], recipe.data.held_out)
    data = Mixture([(first, sources[0][1]), *sources[1:]], seed=recipe.train.seed)
    dtype = DTYPES[recipe.dtype]
    transformer = Transformer(checkpoint.config, dtype=dtype)
    transformer.load(checkpoint.tensors(dtype=dtype, device=target), pack=False)
    model = make_model(recipe, transformer)
    if recipe.adapter.initial is not None:
        take_adapter(model, Path(recipe.adapter.initial))
    history: list[dict[str, Any]] = []
    log = (output / "log.jsonl").open("a", encoding="utf-8")
    columns = (
        TextColumn("update"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with log, Progress(*columns, console=screen.errors_console()) as bar:
        task = bar.add_task("", total=recipe.train.steps, state="")

        def tell(progress: Any) -> None:
            record = {
                "step": progress.step,
                "loss": progress.loss,
                "rate": progress.rate,
                "grad_norm": progress.grad_norm,
                "seconds": progress.seconds,
                **progress.parts,
                **{f"held_out_{name}": value for name, value in (progress.evaluation or {}).items()},
            }
            history.append(record)
            log.write(json_module.dumps(record) + "\n")
            log.flush()
            bar.update(task, completed=progress.step, state=f"loss {progress.loss:.3f}  {progress.seconds:.1f} s")

        try:
            train_model(
                model,
                make_objective(recipe),
                data,
                recipe.train,
                run_directory,
                tell=tell,
                evaluate=Held(held, recipe.block_length) if held else None,
            )
        except Interrupted as end:
            screen.say(f"{end}: saved in {output}. The same command continues.")
            raise typer.Exit(128 + end.signum) from None
    export_adapter(output / "adapter", model, recipe, checkpoint.fingerprint())
    return {
        "adapter": str(output / "adapter"),
        "steps": recipe.train.steps,
        **({"last": history[-1]} if history else {}),
    }
