"""`trimode train`: run a recipe."""

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Threads, whole_number
from trimode.errors import SettingError

__all__ = ["run", "train"]


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file; recipes/ holds examples.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="The run's folder; the same again continues."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value, such as train.steps=100.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run needs in memory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on standard output.")] = False,
) -> None:
    """Train by a recipe.

    Its objective is adapter (a LoRA that makes an autoregressive model tri-mode, its own text untouched), joint,
    diffusion or ar (the weights, or a LoRA merged into them), or drafter (a LoRA for the drafts of a tri-mode
    checkpoint). Ctrl-C or SIGTERM saves and ends; the same command continues, bit for bit. Under torchrun the ranks
    share the batch.
    """
    num_threads = None if threads is None else whole_number(threads, "--threads", low=1)
    # torch is imported from here on
    from trimode.training.recipe import read_recipe

    settings = read_recipe(Path(recipe), changes or [])
    if plan:
        from trimode.device import pick_device

        memory = _say_needs(settings, _sizes_of_base(settings), pick_device(device))
        if json:
            screen.print_json({"memory_bytes": memory})
        return
    if output is None:
        raise SettingError("--output names the run's folder. Give it, or --plan to start nothing.")
    summary = run(settings, Path(output), device, num_threads)
    if not screen.is_first_rank():
        return
    if json:
        screen.print_json(summary)
    else:
        screen.say(json_module.dumps(summary))


def run(
    recipe: Any, output: Path, device: str | None, threads: int | None, checkpoint: Any = None, sources: Any = None
) -> dict[str, Any]:
    """Train as the recipe says and write what came of it; the summary. `checkpoint`: the base, opened already; `sources`: the data,
    read already."""
    from contextlib import ExitStack

    from trimode.device import set_threads

    set_threads(threads)
    with ExitStack() as stack:
        target = _join_ranks(device, stack)
        return _run(recipe, output, target, checkpoint or _open_base(recipe), sources)


def _open_base(recipe: Any) -> Any:
    """The base, with the mask that the recipe names."""
    from dataclasses import replace

    from trimode.checkpoint import open_checkpoint
    from trimode.training.convert import choose_mask

    checkpoint = open_checkpoint(recipe.base)
    if recipe.mask_token is None:
        return checkpoint
    mask = choose_mask(checkpoint.config, checkpoint.tokenizer(), recipe.mask_token)
    return replace(checkpoint, config=replace(checkpoint.config, mask_token_id=mask))


def _sizes_of_base(recipe: Any) -> Any:
    """The base's config, without a network where its sizes are known."""
    from trimode.checkpoint.presets import published_sizes

    sizes = published_sizes(recipe.base)
    if sizes is None:
        return _open_base(recipe).config
    screen.say(f"{recipe.base} was not read: sizes as published")
    return sizes


def _say_needs(recipe: Any, config: Any, target: Any) -> dict[str, int]:
    """What the run needs in memory, said before it starts; the bytes by name."""
    from dataclasses import asdict

    from trimode.device import total_memory
    from trimode.training.memory import training_memory

    memory = training_memory(config, recipe, int(os.environ.get("WORLD_SIZE", "1")))
    has = total_memory(target)
    screen.say(
        f"needs about {memory.total / 1e9:.2f} GB: weights {memory.weights / 1e9:.2f}, gradients "
        f"{memory.gradients / 1e9:.2f}, optimiser {memory.optimizer / 1e9:.2f}, activations {memory.activations / 1e9:.2f}"
        + (f"; there are {has / 1e9:.2f} here" if has is not None and has < memory.total else "")
    )
    return {**asdict(memory), "total": memory.total}


def _join_ranks(device: str | None, stack: Any) -> Any:
    """The device of this rank; under torchrun the ranks find each other first."""
    import torch
    import torch.distributed as dist

    from trimode.device import pick_device

    target = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if target.type == "cuda":
            target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(target)
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
        stack.callback(dist.destroy_process_group)
    return target


def _documents(recipe: Any, sources: list[tuple[list[Any], float]]) -> tuple[Any, list[Any]]:
    """The mixture to train on, and the documents kept aside."""
    from trimode.training.convert import split_held_out
    from trimode.training.data import Mixture

    first, held = split_held_out(sources[0][0], recipe.data.held_out)
    return Mixture([(first, sources[0][1]), *sources[1:]], seed=recipe.train.seed), held


def read_sources(recipe: Any, checkpoint: Any) -> list[tuple[list[Any], float]]:
    """The documents of each source, and its weight."""
    from trimode.training.encode import make_encode, read_source

    encode = make_encode(checkpoint)
    skipped: list[str] = []
    skip = skipped.append if recipe.data.bad_lines == "skip" else None
    max_tokens, vocab_size = recipe.data.max_tokens, checkpoint.config.vocab_size
    sources = [
        (read_source(source, encode, max_tokens=max_tokens, vocab_size=vocab_size, skip=skip), source.weight)
        for source in recipe.data.sources
    ]
    if skipped and screen.is_first_rank():
        screen.say(f"{len(skipped)} lines skipped; the first: {skipped[0]}")
    return sources


def _run(recipe: Any, output: Path, target: Any, checkpoint: Any, sources: Any) -> dict[str, Any]:
    import torch

    from trimode.cli.train_log import TrainingLog
    from trimode.model.transformer import Transformer
    from trimode.training import convert
    from trimode.training.run_state import RunDirectory
    from trimode.training.trainer import Interrupted
    from trimode.training.trainer import train as train_model

    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    run_directory = RunDirectory(output, identity=recipe.identity())
    data, held = _documents(recipe, sources or read_sources(recipe, checkpoint))
    if screen.is_first_rank():
        _say_needs(recipe, checkpoint.config, target)
    full = recipe.weights == "full"
    dtype = torch.float32 if full else convert.DTYPES[recipe.dtype]
    transformer = Transformer(checkpoint.config, dtype=dtype)
    transformer.load(checkpoint.tensors(dtype=dtype, device=target), pack=False)
    model = convert.make_model(recipe, transformer)
    if recipe.adapter.initial is not None:
        convert.take_adapter(model, Path(recipe.adapter.initial))
    if recipe.train.shard and num_ranks > 1:
        convert.shard(model)
    run_directory.begin()
    with TrainingLog(output, recipe.train.steps, target, run_directory.num_done) as log:
        try:
            train_model(
                model,
                convert.make_objective(recipe),
                data,
                recipe.train,
                run_directory,
                autocast=full and recipe.dtype == "bfloat16",
                tell=log.tell,
                evaluate=convert.Held(held, recipe) if held else None,
            )
        except Interrupted as end:
            if screen.is_first_rank():
                screen.say(f"{end}: saved in {output}. The same command continues.")
            raise typer.Exit(128 + end.signum) from None
    log.draw(recipe)
    summary: dict[str, Any] = {"steps": recipe.train.steps, **log.cost()}
    if log.history:
        summary["last"] = log.history[-1]
        if screen.is_first_rank():
            screen.say(log.cost_in_words())
    if recipe.objective in ("adapter", "drafter"):
        if screen.is_first_rank():
            convert.export_adapter(output / "adapter", model, recipe, checkpoint.fingerprint())
        return {"adapter": str(output / "adapter"), **summary}
    convert.export_checkpoint(output / "checkpoint", model, recipe, checkpoint.tokenizer())
    return {"checkpoint": str(output / "checkpoint"), **summary}
