"""`trimode bench`: every mode on the same prompts, interleaved, with `ar` as the baseline."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Dtype, Json, Quantize, Threads, given, parse, whole_number
from trimode.errors import DataError, SettingError
from trimode.viz import terminal

__all__ = ["bench"]


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, directory, GGUF file or hub id.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", help="JSONL with `prompt` and `category`; built-in ones if not given."
        ),
    ] = None,
    modes: Annotated[
        str, typer.Option("--modes", metavar="LIST", help="With commas; knobs behind colons: diffusion:threshold=0.8")
    ] = "ar,diffusion,self_spec,auto",
    max_new_tokens: Annotated[str, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = "64",
    limit: Annotated[str | None, typer.Option("--limit", metavar="K", help="Only the first K prompts.")] = None,
    rounds: Annotated[
        str, typer.Option("--rounds", metavar="N", help="Repetitions; two or more tell the noise.")
    ] = "2",
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of the order in which modes take turns.")] = "0",
    peer: Annotated[
        str | None, typer.Option("--peer", metavar="NAME", help="transformers: the same weights and prompts there.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where bench.json and its requests go.")
    ] = "runs/bench",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure speed, tokens per forward and acceptance of every mode.

    Ctrl-C keeps what was measured, marked as partial; the same command with --resume goes on.
    """
    chosen = [_setting(text.strip()) for text in modes.split(",") if text.strip()]
    if not any(mode == "ar" and not knobs for mode, knobs in chosen):
        chosen.insert(0, ("ar", {}))  # the baseline of all comparisons
    if peer not in (None, "transformers"):
        raise SettingError(f"--peer must be transformers; got {peer!r}.")
    plan = {
        "max_new_tokens": given({"max_new_tokens": max_new_tokens})["max_new_tokens"],
        "rounds": whole_number(rounds, "--rounds", low=1),
        "seed": whole_number(seed, "--seed", low=0),
    }
    most = None if limit is None else whole_number(limit, "--limit", low=1)
    from trimode.evaluation.prompts import read_bench_prompts

    texts = read_bench_prompts(None if prompts is None else Path(prompts), limit=most)
    from trimode.evaluation import benchmark

    runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
    benchmark.probe_adapter(runner)
    settings = [benchmark.Setting(mode=mode, knobs=knobs) for mode, knobs in chosen]
    contestants: dict[str, Any] = {"trimode": benchmark.Own(runner)}
    if peer is not None:
        contestants[peer] = benchmark.Transformers(runner)
        settings.append(benchmark.Setting(mode="ar", engine=peer))
    about = {
        "model": model,
        "dtype": contestants["trimode"].dtype,
        "prompts": [p.prompt for p in texts],
        "settings": [s.label for s in settings],
        **plan,
        **benchmark.machine(),
    }
    about = jsonlib.loads(jsonlib.dumps(about))
    folder = Path(output)
    records = _begin(folder, about, resume)
    known = {(r.label, r.prompt, r.round) for r in records}
    partial = False
    try:
        with (folder / "requests.jsonl").open("a", encoding="utf-8") as file:
            for one in benchmark.measure(contestants, settings, texts, done=lambda *key: key in known, **plan):
                records.append(one)
                file.write(jsonlib.dumps(benchmark.as_record(one)) + "\n")
                file.flush()
    except KeyboardInterrupt:
        partial = True
    rows = benchmark.summarise(records)
    report = {**about, "partial": partial, "results": rows, "requests": [benchmark.as_record(r) for r in records]}
    (folder / "bench.json").write_text(jsonlib.dumps(report, indent=1), encoding="utf-8")
    if json:
        screen.print_json(report)
    else:
        screen.answers_console().print(terminal.bench_table(rows))
        if any(row["noise"] and row["noise"]["too_noisy"] for row in rows):
            screen.say(
                "This machine is too noisy now: repetitions of one request differ too much for its speeds to count."
            )
        screen.say(f"In {folder / 'bench.json'}")
    if partial:
        screen.say(f"Stopped: {len(records)} requests are kept. The same command with --resume goes on.")
        raise typer.Exit(130)


def _setting(text: str) -> tuple[str, dict[str, Any]]:
    mode, *pairs = text.split(":")
    knobs: dict[str, Any] = {"mode": parse("mode", mode)}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--modes takes knobs as name=value; got {pair!r} in {text!r}.")
        knobs[name] = parse(name, value)
    return knobs.pop("mode"), knobs


def _begin(folder: Path, about: dict[str, Any], resume: bool) -> list[Any]:
    """What was measured before; DataError if the folder holds another run, or one that would be overwritten."""
    from trimode.evaluation.benchmark import Measured

    plan, requests = folder / "plan.json", folder / "requests.jsonl"
    if resume:
        if not plan.is_file():
            raise DataError(f"{folder} holds no run to go on with. Leave out --resume.")
        if jsonlib.loads(plan.read_text(encoding="utf-8")) != about:
            raise DataError(f"{folder} holds a run with other settings, versions or prompts. Choose another --output.")
        return [Measured(**jsonlib.loads(line)) for line in requests.read_text(encoding="utf-8").splitlines()]
    if plan.is_file():
        raise DataError(f"{folder} already holds a run. Add --resume to go on with it, or choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(jsonlib.dumps(about), encoding="utf-8")
    requests.write_text("", encoding="utf-8")
    return []
