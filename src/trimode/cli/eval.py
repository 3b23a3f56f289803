"""`trimode eval`: tasks with exact grading, by mode; and what a variant's rounding changes."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import progress, screen
from trimode.cli.modes import mode_settings, modes_of
from trimode.cli.options import Device, Dtype, Json, Quantize, Threads, given, whole_number
from trimode.errors import MissingMaskTokenError, SettingError
from trimode.viz import scores

__all__ = ["evaluate"]

DEFAULT_TASKS = "json,copy,count"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, directory, GGUF file or hub id.")],
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="LIST", help="With commas: gsm8k=FILE, humaneval=FILE, json, copy, count."),
    ] = DEFAULT_TASKS,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="LIST",
            help="With commas; knobs behind colons: diffusion:threshold=0.8. Those of the checkpoint if not given.",
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--limit", metavar="K", help="Only the first K examples of each task (50 of made ones)."),
    ] = None,
    max_new_tokens: Annotated[
        str | None, typer.Option("--max-new-tokens", metavar="N", help="Longest answer; the task's own if not given.")
    ] = None,
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of examples that are made up, and of draws.")] = "0",
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="humaneval: run programs even where this system cannot confine them.")
    ] = False,
    likelihood: Annotated[
        str | None,
        typer.Option(
            "--likelihood",
            metavar="FILE",
            help="Instead of tasks: score texts under both views; JSONL with `text`, or `prompt` and `answer`.",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="N", help="Of the diffusion bound, for each number of masks. [4]"),
    ] = None,
    quantization_report: Annotated[
        bool,
        typer.Option("--quantization-report", help="Instead of tasks: how far rounded variants are from float32."),
    ] = False,
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="LIST",
            help="Of the report: bfloat16, float16, int8, q8_0, llama.cpp [int8,q8_0,bfloat16]",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where eval.json and the samples go.")
    ] = "runs/eval",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Grade a model's answers exactly, mode by mode; or score texts under both views; or tell what rounding changes.

    Every sample is kept with prompt, answer, grade and cost. Ctrl-C keeps what was graded; the same command with --resume goes on.
    """
    if samples is not None and likelihood is None:
        raise SettingError("--samples has no effect without --likelihood. Leave it out, or add that.")
    if likelihood is not None:
        if tasks != DEFAULT_TASKS or quantization_report:
            raise SettingError(
                "--likelihood takes the place of --tasks and --quantization-report. Leave the others out."
            )
        _likelihood(
            model,
            likelihood,
            limit=None if limit is None else whole_number(limit, "--limit", low=1),
            samples=whole_number(samples or "4", "--samples", low=2),
            seed=whole_number(seed, "--seed", low=0),
            folder=Path(output),
            load=lambda: screen.load(model, dtype=dtype, device=device, threads=threads),
            resume=resume,
            json=json,
        )
        return
    if quantization_report:
        if tasks != DEFAULT_TASKS:
            raise SettingError("--tasks has no effect with --quantization-report. Leave it out.")
        if dtype is not None:
            raise SettingError("--dtype has no effect with --quantization-report. Name it among --variants.")
        if quantize is not None:
            raise SettingError("--quantize has no effect with --quantization-report. Name it among --variants.")
        _report(model, variants or "int8,q8_0,bfloat16", device=device, threads=threads, json=json)
        return
    if variants is not None:
        raise SettingError("--variants has no effect without --quantization-report. Leave it out, or add that.")
    chosen = None if modes is None else mode_settings(modes)
    most = None if max_new_tokens is None else given({"max_new_tokens": max_new_tokens})["max_new_tokens"]
    from trimode.evaluation.tasks.opening import needs_sandbox, open_tasks

    opened = open_tasks(
        [word.strip() for word in tasks.split(",") if word.strip()],
        limit=None if limit is None else whole_number(limit, "--limit", low=1),
        seed=whole_number(seed, "--seed", low=0),
    )
    if needs_sandbox(opened):
        if not trust_code:
            from trimode.evaluation.sandbox import require_confinement

            require_confinement()
    elif trust_code:
        raise SettingError("--trust-code has no effect: no task runs programs. Leave it out.")
    from trimode.evaluation.evaluate import EvalSetting

    runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
    if chosen is None:
        chosen = [(mode, {}) for mode in modes_of(runner, ("ar", "diffusion", "self_spec"), "ar and auto are graded")]
    settings = [EvalSetting(mode=mode, knobs=knobs) for mode, knobs in chosen]
    about = {
        "model": model,
        "precision": runner.precision,
        "tasks": {task.name: [e.id for e in task.examples] for task in opened},
        "prompts": {task.name: [e.prompt for e in task.examples] for task in opened},
        "settings": [s.label for s in settings],
        "max_new_tokens": most,
        "seed": seed,
    }
    _run(runner, opened, settings, about, most, Path(output), resume=resume, json=json)


def _run(
    runner: Any, tasks: Any, settings: Any, about: Any, most: int | None, folder: Path, *, resume: bool, json: bool
) -> None:
    from trimode.evaluation import evaluate as core
    from trimode.evaluation.meters import machine
    from trimode.evaluation.run_folder import RunFolder

    run = RunFolder.open(folder, "samples", about, resume=resume)
    known = {(s["task"], s["setting"], s["id"]) for s in run.records}
    total = sum(len(task.examples) for task in tasks) * len(settings)
    partial = False
    try:
        with progress.bar(total - len(known)) as advance:
            samples = core.evaluate(runner, tasks, settings, max_new_tokens=most, done=lambda *key: key in known)
            advance("")
            for sample in samples:
                run.append(sample)
                advance(f"{sample['task']}, {sample['setting']}")
    except KeyboardInterrupt:
        partial = True
    rows = core.summarise_eval(run.records)
    about = {key: value for key, value in about.items() if key != "prompts"}
    report = jsonlib.loads(jsonlib.dumps({**about, **machine(runner), "partial": partial, "results": rows}))
    path = run.finish("eval.json", report)
    if json:
        screen.print_json(report)
    else:
        if rows:
            screen.answers_console().print(scores.eval_table(rows))
        screen.say(f"In {path}; every answer with its grade in {folder / 'samples.jsonl'}")
    if partial:
        screen.say(f"Stopped: {len(run.records)} of {total} are kept. The same command with --resume goes on.")
        raise typer.Exit(130)


def _report(model: str, written: str, *, device: str | None, threads: str | None, json: bool) -> None:
    from trimode.evaluation import quantization

    names = [word.strip() for word in written.split(",") if word.strip()]
    quantization.check_variants(names)
    reference = screen.load(model, dtype="float32", device=device, threads=threads)
    rows: list[dict[str, Any]] = []
    for name in names:
        screen.say(f"{name} against float32")
        variant = quantization.load_variant(reference, name)
        rows += quantization.compare(reference, variant, name)
    if json:
        screen.print_json({"model": model, "places_of": "evaluation/report_text.txt", "results": rows})
    else:
        screen.answers_console().print(scores.quantization_table(rows))


def _likelihood(
    model: str,
    file: str,
    *,
    limit: int | None,
    samples: int,
    seed: int,
    folder: Path,
    load: Any,
    resume: bool,
    json: bool,
) -> None:
    from trimode.evaluation.texts import read_texts, score_texts, summarise_texts

    texts = read_texts(Path(file), limit=limit)
    runner = load()
    if runner.config.mask_token_id is None:
        raise MissingMaskTokenError(
            f"{model} names no mask token, so it has no block view to score under. Convert it first."
        )
    from trimode.evaluation.run_folder import RunFolder

    about = {
        "model": model,
        "precision": runner.precision,
        "texts": [t.id for t in texts],
        "samples": samples,
        "seed": seed,
    }
    run = RunFolder.open(folder, "texts", about, resume=resume)
    known = {r["id"] for r in run.records}
    partial = False
    try:
        with progress.bar(len(texts) - len(known)) as advance:
            advance("")
            for scored in score_texts(runner, texts, samples=samples, seed=seed, done=lambda id: id in known):
                run.append(scored)
                advance(scored["group"])
    except KeyboardInterrupt:
        partial = True
    rows = summarise_texts(run.records)
    report = {**about, "partial": partial, "left_out": len(texts) - len(run.records), "results": rows}
    path = run.finish("likelihood.json", report)
    if json:
        screen.print_json(report)
    else:
        screen.answers_console().print(scores.likelihood_table(rows))
        screen.say(f"In {path}")
        if report["left_out"] and not partial:
            screen.say(f"{report['left_out']} of {len(texts)} texts are left out: too short or too long.")
    if partial:
        screen.say(f"Stopped: {len(run.records)} of {len(texts)} are kept. The same command with --resume goes on.")
        raise typer.Exit(130)
