"""`trimode tune`: the fastest setting of this checkpoint on this machine within a stated loss of quality."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import progress, screen
from trimode.cli.modes import mode_settings
from trimode.cli.options import Device, Dtype, Json, Quantize, Threads, given, whole_number
from trimode.errors import DataError, SettingError
from trimode.viz import terminal

__all__ = ["tune"]


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, directory or hub id.")],
    loss: Annotated[
        str, typer.Option("--loss", metavar="X", help="Quality that may be lost, as a share of ar's: 0.02 is 2 %.")
    ] = "0.02",
    settings: Annotated[
        str | None,
        typer.Option(
            "--settings",
            metavar="LIST",
            help="What to try, written as for bench --modes; if not given, thresholds, block lengths, policies and kinds "
            "around the checkpoint's own.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="JSONL with `prompt`; built-in ones if not given."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="NAME", help="Quality by a task of eval, such as gsm8k=FILE, instead of likelihood."
        ),
    ] = None,
    limit: Annotated[str, typer.Option("--limit", metavar="K", help="Only the first K prompts.")] = "10",
    max_new_tokens: Annotated[str, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = "48",
    rounds: Annotated[str, typer.Option("--rounds", metavar="N", help="Repetitions.")] = "1",
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of the order in which settings take turns.")] = "0",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and tell; write no generation_config.json.")
    ] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where tune.json, its requests and the picture go.")
    ] = "runs/tune",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find the fastest setting within a stated loss of quality, and make it what auto stands for.

    Settings take turns prompt by prompt. Quality is how likely the answers are under the causal view, relative to greedy
    ar's, or a task's grades. The choice goes into the checkpoint's generation_config.json; --mode auto takes it from there.
    """
    allowed = _share(loss)
    chosen = None if settings is None else mode_settings(settings, "--settings")
    if task is not None and prompts is not None:
        raise SettingError("--task brings its own prompts, so --prompts has no effect. Leave one of them out.")
    plan = {
        "max_new_tokens": given({"max_new_tokens": max_new_tokens})["max_new_tokens"],
        "rounds": whole_number(rounds, "--rounds", low=1),
        "seed": whole_number(seed, "--seed", low=0),
    }
    most = whole_number(limit, "--limit", low=1)
    from trimode.checkpoint import open_checkpoint

    place = open_checkpoint(model).generation_path
    if not dry_run:
        _check_writable(place, model)
    texts, graded = _prompts(prompts, task, most, plan["seed"])
    runner = screen.load(model, dtype=dtype, quantize=quantize, device=device, threads=threads)
    if runner.config.mask_token_id is None:
        raise SettingError(
            f"{model} names no mask token, so there is nothing to tune: auto weighs ar and lookup by itself."
        )
    report = _measure(runner, model, chosen, texts, graded, plan, allowed, Path(output), resume=resume)
    if report["partial"]:
        screen.say(f"Stopped: {report['measured']} requests are kept. The same command with --resume goes on.")
        raise typer.Exit(130)
    if not dry_run:
        from trimode.checkpoint.tuning_files import write_auto

        assert place is not None
        best = next(p for p in report["points"] if p["label"] == report["chosen"])
        found = {key: report[key] for key in ("quality_is", "loss", "dtype", "hardware", "versions")}
        found |= {key: best[key] for key in ("quality", "tokens_per_second", "tokens_per_forward")}
        write_auto(place, {"mode": best["mode"], **best["settings"]}, found)
    _tell(report, Path(output), None if dry_run else place, json=json)


def _measure(
    runner: Any,
    name: str,
    chosen: Sequence[tuple[str, dict[str, Any]]] | None,
    texts: Any,
    graded: Any,
    plan: dict[str, int],
    allowed: float,
    folder: Path,
    *,
    resume: bool,
) -> dict[str, Any]:
    from trimode.evaluation import benchmark, meters
    from trimode.evaluation import tune as core
    from trimode.evaluation.run_folder import RunFolder

    benchmark.probe_adapter(runner)
    settings = core.default_settings(runner)
    if chosen is not None:
        settings = [benchmark.Setting(mode=mode, knobs=knobs) for mode, knobs in chosen]
        if all(setting.label != "ar" for setting in settings):
            settings.insert(0, benchmark.Setting(mode="ar"))
    if graded is not None:
        texts = core.task_prompts(runner, graded)
    own = benchmark.Own(runner)
    about = {
        "model": name,
        "dtype": own.dtype,
        "quality_is": "likelihood under the causal view, relative to ar"
        if graded is None
        else f"score in {graded.name}",
        "prompts": [p.prompt for p in texts],
        "settings": [s.label for s in settings],
        **plan,
        **meters.machine(runner),
    }
    run = RunFolder.open(folder, "requests", about, resume=resume)
    records = [benchmark.Measured(**record) for record in run.records]
    known = {(r.label, r.prompt, r.round) for r in records}
    partial = False
    try:
        with progress.bar(len(texts) * len(settings) * plan["rounds"] - len(known)) as advance:
            advance("warming up")
            asked = benchmark.measure({"trimode": own}, settings, texts, done=lambda *key: key in known, **plan)
            for one in asked:
                records.append(one)
                run.append(asdict(one))
                advance(one.label)
        quality = core.Likeliness(runner, texts) if graded is None else core.Score(runner, graded)
        points = core.to_points(records, quality, graded=graded is not None)
    except KeyboardInterrupt:
        return {"partial": True, "measured": len(records)}
    best = core.pick(points, allowed)
    report = {
        **about,
        "partial": partial,
        "loss": allowed,
        "least_quality": core.least_quality(points, allowed),
        "chosen": best["label"],
        "aup": {
            mode: core.aup([(p["tokens_per_forward"], 100 * p["quality"]) for p in points if p["mode"] in ("ar", mode)])
            for mode in dict.fromkeys(p["mode"] for p in points)
        },
        "points": points,
    }
    run.finish("tune.json", report)
    return report


def _tell(report: dict[str, Any], folder: Path, written: Path | None, *, json: bool) -> None:
    from trimode.viz.plots import tune_picture

    try:
        tune_picture(report, folder)
    except ImportError:
        screen.say("The picture needs matplotlib: pip install matplotlib.")
    if json:
        screen.print_json(report)
        return
    console = screen.answers_console()
    console.print(terminal.tune_table(report["points"], report["chosen"], report["least_quality"]))
    areas = ", ".join(f"{mode} {area:.0f}" for mode, area in report["aup"].items())
    screen.say(f"Quality: {report['quality_is']}; at least {report['least_quality']:.3f} was asked for. AUP: {areas}")
    if any(p["noise"] and p["noise"]["too_noisy"] for p in report["points"]):
        screen.say("This machine is too noisy now for these speeds to count. Tune again when it is quiet.")
    elif report["rounds"] == 1:
        screen.say("One round cannot tell the machine's noise: --rounds 2 can.")
    screen.say(f"In {folder / 'tune.json'}, the picture beside it")
    if written is not None:
        screen.say(f"auto now stands for {report['chosen']}: {written}")


def _prompts(file: str | None, task: str | None, limit: int, seed: int) -> tuple[Any, Any]:
    """Prompts, or the task that brings them."""
    if task is None:
        from trimode.evaluation.prompts import read_bench_prompts

        return read_bench_prompts(None if file is None else Path(file), limit=limit), None
    from trimode.evaluation.tasks.opening import needs_sandbox, open_tasks

    opened = open_tasks([task], limit=limit, seed=seed)
    if needs_sandbox(opened):
        from trimode.evaluation.sandbox import require_confinement

        require_confinement()
    return None, opened[0]


def _check_writable(place: Path | None, model: str) -> None:
    """Told before an hour of measuring, not after it."""
    if place is None:
        raise DataError(
            f"{model} has no directory of its own, where the choice could be kept. Tune a copy "
            f"(trimode convert {model} --quantize int8 --output DIR), or add --dry-run to measure all the same."
        )
    folder = place.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"{place} cannot be written. Add --dry-run to measure all the same.")


def _share(written: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise SettingError(f"--loss must be a share from 0 to below 1, such as 0.02; got {written!r}.")
    return value
