"""`trimode convert`: an autoregressive checkpoint becomes one that decodes in every mode."""

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen, train
from trimode.cli.options import Device, Threads, whole_number
from trimode.errors import SettingError

__all__ = ["convert"]

DOCUMENTS_PER_STEP = 4


MADE = "made.json"
"""In the run's folder: what the finished checkpoint was made of."""
UNTRAINED = ("base", "output", "quantize", "json")
"""Parameters that mean something where nothing is trained."""


def convert(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Preset, directory, GGUF file or hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The new checkpoint; the run is kept in DIR.run.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Documents, best BASE's own answers (trimode distill)."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="NAME", help="Train nothing: write BASE packed in int8, opened in no time."),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Train a LoRA on masks alone; BASE's own text stays as it is. The default."),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights by the joint objective; BASE's own text changes too.")
    ] = False,
    steps: Annotated[str, typer.Option("--steps", metavar="N", help="Updates.")] = "1000",
    block_length: Annotated[str, typer.Option("--block-length", metavar="N", help="Tokens of a block.")] = "8",
    max_tokens: Annotated[str, typer.Option("--max-tokens", metavar="N", help="Longer documents are cut.")] = "512",
    mask_token: Annotated[
        str | None,
        typer.Option(
            "--mask-token", metavar="TOKEN|ID", help="Stands for what is not known yet; an unused one if not given."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the recipe, such as train.rate=1e-4."),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on standard output.")] = False,
) -> None:
    """Make a Llama-like checkpoint tri-mode: train on documents, and write a checkpoint that decodes in every mode.

    With --quantize int8 nothing is trained: BASE is written as it is, adapter and all, in the format that the native engine maps.

    Ctrl-C or SIGTERM saves and ends; the same command continues.
    """
    if adapter and full:
        raise SettingError("--adapter and --full are two ways. Choose one.")
    num_steps = whole_number(steps, "--steps", low=1)
    length = whole_number(block_length, "--block-length", low=2)
    longest = whole_number(max_tokens, "--max-tokens", low=8)
    num_threads = None if threads is None else whole_number(threads, "--threads", low=1)
    target = Path(output)
    if target.name in ("", ".."):  # a folder without a name of its own would have its run inside
        target = target.resolve()
    is_taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    taken = SettingError(f"{target} exists already and is not empty. Choose another place or remove it.")

    run = target.parent / f"{target.name}.run"
    if is_taken and (quantize is not None or not run.exists()):
        raise taken
    if quantize is not None:
        idle = [p.opts[0] for p in context.command.params if p.name not in UNTRAINED and _is_given(context, p.name)]
        _quantized(base, target, quantize, idle, json=json)
        return
    if not data:
        raise SettingError("--data names the documents to train on. Give it, or --quantize int8 to train nothing.")

    from dataclasses import replace

    from trimode.checkpoint import open_checkpoint
    from trimode.training.convert import choose_mask, write_converted
    from trimode.training.recipe import make_recipe

    checkpoint = open_checkpoint(base)
    config = checkpoint.config
    if checkpoint.stored_adapter is not None or config.trained_for_blocks:
        raise SettingError(f"{base} decodes in every mode already. Train it further with trimode train.")
    mask = choose_mask(config, checkpoint.tokenizer(), mask_token)
    checkpoint = replace(checkpoint, config=replace(config, mask_token_id=mask))
    raw: dict[str, Any] = {
        "base": base,
        "objective": "joint" if full else "adapter",
        "block_length": length,
        "data": {
            "sources": [{"path": str(Path(file).resolve())} for file in data],
            "max_tokens": min(longest, config.max_positions),
            "held_out": 0,
        },
        "train": {
            "steps": num_steps,
            "documents_per_step": DOCUMENTS_PER_STEP,
            "documents_per_forward": DOCUMENTS_PER_STEP,
            "schedule": "wsd",
            "rate": 2e-5 if full else 1e-3,
            "decay": 0.4,
            "floor": 0.02,
        },
    }
    if full:
        raw["weights"] = "full"
    else:
        raw["blocks"] = {"block_lengths": [length], "partial": 0.2, "distill": 0.3}
    recipe = make_recipe(raw, Path.cwd(), changes or [])
    made = _asked(target, checkpoint, data, recipe)
    if is_taken:
        if not _has_made(run / MADE, made, target):
            raise taken
        if screen.is_first_rank():
            screen.say(f"{target} is finished; remove it and {run} to make it anew.")
            if json:
                screen.print_json({"checkpoint": str(target), "mask_token_id": mask, "steps": recipe.train.steps})
        return
    sources = train.read_sources(recipe, checkpoint)
    summary = train.run(recipe, run, device, num_threads, checkpoint, sources)
    if not screen.is_first_rank():
        return
    (run / MADE).write_text(jsonlib.dumps(made), encoding="utf-8")
    documents = [document for source, _ in sources for document in source]
    write_converted(target, run, recipe, checkpoint, documents)
    summary = {
        "checkpoint": str(target),
        "mask_token_id": mask,
        **{k: summary[k] for k in ("steps", "last") if k in summary},
    }
    if json:
        screen.print_json(summary)
    else:
        screen.say(f"{target} decodes in every mode: trimode generate --model {target} --mode self_spec 'Hello'")


def _is_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"  # by name: typer may bring a click of its own


def _asked(target: Path, base: Any, data: Sequence[str], recipe: Any) -> dict[str, Any]:
    """All that a finished checkpoint hangs on: documents by their places, sizes and times."""
    files = [Path(file).resolve() for file in data]
    asked = {
        "target": str(target.resolve()),
        "base": [str(base.path.resolve()), base.fingerprint()],
        "data": [[str(file), file.stat().st_size, file.stat().st_mtime] for file in files if file.is_file()],
        "recipe": recipe.identity(),
        "steps": recipe.train.steps,
        "mask": base.config.mask_token_id,
    }
    return jsonlib.loads(jsonlib.dumps(asked))


def _has_made(record: Path, asked: dict[str, Any], target: Path) -> bool:
    """Whether a run made the checkpoint that lies there of just this."""
    try:
        return jsonlib.loads(record.read_text(encoding="utf-8")) == asked and (target / "config.json").is_file()
    except (OSError, ValueError):
        return False


def _quantized(base: str, target: Path, quantize: str, idle: list[str], *, json: bool) -> None:
    if quantize != "int8":
        raise SettingError(f"--quantize must be int8; got {quantize!r}.")
    if idle:
        raise SettingError(f"{idle[0]} has no effect with --quantize, which trains nothing. Leave it out.")
    from trimode.checkpoint import open_checkpoint, save_packed_checkpoint
    from trimode.checkpoint.packing import packed_weights
    from trimode.device import NATIVE_MISSING, native_kernels

    if not native_kernels():
        raise SettingError(f"--quantize int8 needs the native engine to pack weights: {NATIVE_MISSING}")
    checkpoint = open_checkpoint(base)
    if checkpoint.packed is not None:
        raise SettingError(f"{base} is in int8 already. Copy the directory.")
    weights, tokenizer = packed_weights(checkpoint, "int8"), checkpoint.tokenizer()
    save_packed_checkpoint(
        target, checkpoint, weights, adapter=checkpoint.adapter(), tokenizer=tokenizer, ngrams=checkpoint.ngrams()
    )
    num_bytes = (target / "model.safetensors").stat().st_size
    if json:
        screen.print_json({"checkpoint": str(target), "weight_bytes": num_bytes})
    else:
        screen.say(
            f"{target} holds {base} in int8, {num_bytes / 1e6:.1f} MB: trimode generate --model {target} 'Hello'"
        )
