"""`trimode bench`: every mode on the same prompts, interleaved, with `ar` as the baseline."""

import json as jsonlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import progress, screen
from trimode.cli.modes import mode_settings, modes_of
from trimode.cli.options import Device, Dtype, Json, Quantize, Threads, given, whole_number
from trimode.cli.tracing import TracePath, Tracer, tracing
from trimode.errors import DataError, SettingError
from trimode.viz import terminal

__all__ = ["bench"]

MODES = "ar,diffusion,self_spec,auto"


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, directory, GGUF file or hub id.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="JSONL with `prompt` and `category`, plain or gzipped; built-in if not given.",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="LIST",
            help=f"With commas; knobs behind colons, alternatives between bars: diffusion:threshold=0.7|0.9. [{MODES}]",
        ),
    ] = None,
    max_new_tokens: Annotated[str, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = "64",
    limit: Annotated[str | None, typer.Option("--limit", metavar="K", help="Only the first K prompts.")] = None,
    rounds: Annotated[
        str, typer.Option("--rounds", metavar="N", help="Repetitions; two or more tell the noise.")
    ] = "2",
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of the order in which modes take turns.")] = "0",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="transformers, transformers:bfloat16, llama.cpp: the same weights and prompts there; may be repeated.",
        ),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option("--load", metavar="LIST", help="Throughput with so many requests in flight, such as 1,2,4,8,16."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="FILE", help="An earlier bench.json: is each speed within its spread?"),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where bench.json, its requests and pictures go.")
    ] = "runs/bench",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    trace: TracePath = None,
) -> None:
    """Measure speed, tokens per forward and acceptance of every mode.

    Modes take turns prompt by prompt in one run, and the same engine's ar is the baseline: "times ar" is the median, over
    requests, of a request's tokens a second over those of ar for the same prompt in the same round. Warm-up never counts, prompt
    tokens never count, and figures that contradict one another are refused. Ctrl-C keeps what was measured, marked as
    partial; the same command with --resume goes on.
    """
    plan = Plan(
        model=model,
        settings=mode_settings(modes or MODES),
        chosen=modes is not None,
        peers=list(dict.fromkeys(peer or [])),
        max_new_tokens=given({"max_new_tokens": max_new_tokens})["max_new_tokens"],
        rounds=whole_number(rounds, "--rounds", low=1),
        seed=whole_number(seed, "--seed", low=0),
        load=_counts(load),
        dtype=dtype,
        quantize=quantize,
        device=device,
        threads=threads,
    )
    most = None if limit is None else whole_number(limit, "--limit", low=1)
    from trimode.evaluation.prompts import read_bench_prompts

    texts = read_bench_prompts(None if prompts is None else Path(prompts), limit=most)
    earlier = _earlier(compare)
    with tracing(trace) as tracer, ExitStack() as opened:
        report = _measure(plan, texts, Path(output), resume, tracer, opened)
    _tell(report, Path(output), earlier, json=json)
    if report["partial"]:
        kept = len(report["requests"])
        screen.say(f"Stopped: {kept} requests are kept. The same command with --resume goes on.")
        raise typer.Exit(130)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was asked for."""

    model: str
    settings: Sequence[tuple[str, dict[str, Any]]]
    chosen: bool
    """The user named the modes."""
    peers: Sequence[str]
    max_new_tokens: int
    rounds: int
    seed: int
    load: Sequence[int]
    dtype: str | None
    quantize: str | None
    device: str | None
    threads: str | None


def _measure(plan: Plan, texts: Any, folder: Path, resume: bool, tracer: Tracer, opened: ExitStack) -> dict[str, Any]:
    """The whole run, or what was done of it when Ctrl-C came."""
    from trimode.evaluation import peers

    peers.check_installed(plan.peers)
    from trimode.evaluation import benchmark, meters
    from trimode.evaluation.forward_cost import forward_costs
    from trimode.evaluation.load import Loaded, measure_load, summarise_load
    from trimode.evaluation.run_folder import RunFolder

    before = meters.resident_bytes()
    runner = screen.load(plan.model, dtype=plan.dtype, quantize=plan.quantize, device=plan.device, threads=plan.threads)
    after = meters.resident_bytes()
    benchmark.probe_adapter(runner)
    resident = None if before is None or after is None else after - before
    own = benchmark.Own(runner, resident_bytes=resident, trace=tracer.trace(runner))
    settings = [benchmark.Setting(mode=mode, knobs=knobs) for mode, knobs in _runnable(plan, runner)]
    asked = list(settings)
    contestants: dict[str, Any] = {"trimode": own}
    longest = max(len(runner.encode(p.as_asked())) for p in texts) + plan.max_new_tokens if plan.peers else 0
    for name in plan.peers:
        contestants[name] = peers.open_peer(name, runner, longest=longest)
        opened.callback(contestants[name].close)
        numbers = contestants[name].dtype
        settings.append(benchmark.Setting(mode="ar", engine=name, dtype=None if numbers == own.dtype else numbers))
    limits = {"max_new_tokens": plan.max_new_tokens, "rounds": plan.rounds, "seed": plan.seed}
    about = {
        "model": plan.model,
        "dtype": own.dtype,
        "quantize": "int8" if own.dtype == "int8" else None,
        "prompts": [p.prompt for p in texts],
        "settings": [s.label for s in settings],
        "load": list(plan.load),
        **limits,
        **meters.machine(runner),
    }
    run = RunFolder.open(folder, "requests", about, resume=resume)
    requests = [benchmark.Measured(**record) for record in run.records if "concurrency" not in record]
    loads = [Loaded(**record) for record in run.records if "concurrency" in record]
    measured = {(r.label, r.prompt, r.round) for r in requests}
    loaded = {(r.label, r.concurrency, r.round) for r in loads}
    total = len(texts) * len(settings) * plan.rounds + len(plan.load) * len(asked) * plan.rounds
    partial, costs = False, None
    try:
        with progress.bar(total - len(run.records)) as advance:
            advance("warming up")
            for one in benchmark.measure(contestants, settings, texts, done=lambda *key: key in measured, **limits):
                requests.append(one)
                run.append(asdict(one))
                advance(one.label)
            if plan.load:
                for each in measure_load(runner, asked, texts, plan.load, done=lambda *key: key in loaded, **limits):
                    loads.append(each)
                    run.append(asdict(each))
                    advance(f"{each.label}, {each.concurrency} in flight")
        costs = forward_costs(runner)
    except KeyboardInterrupt:
        partial = True
    alone = {(r.label, r.prompt): r.token_ids for r in requests}
    report = {
        **about,
        "partial": partial,
        "results": benchmark.summarise(requests),
        "load": summarise_load(loads, alone),
        "forward_cost": costs,
        "notes": [note for name in plan.peers for note in contestants[name].notes],
        "requests": [asdict(one) for one in requests],
    }
    run.finish("bench.json", report)
    return report


def _runnable(plan: Plan, runner: Any) -> list[tuple[str, dict[str, Any]]]:
    """The settings, the baseline first; of modes that nobody asked for by name only those that this checkpoint has."""
    chosen = list(plan.settings)
    if not plan.chosen:
        modes = [mode for mode, _ in chosen]
        chosen = [(mode, {}) for mode in modes_of(runner, modes, "ar and auto are measured")]
    if ("ar", {}) not in chosen:
        chosen.insert(0, ("ar", {}))
    return chosen


def _tell(report: dict[str, Any], folder: Path, earlier: dict[str, Any] | None, *, json: bool) -> None:
    from trimode.evaluation.benchmark import compare
    from trimode.viz.plots import bench_pictures

    pictures: list[Path] = []
    try:
        pictures = bench_pictures(report, folder)
    except ImportError:
        screen.say("The pictures need matplotlib: pip install matplotlib.")
    rows = report["results"]
    compared = [] if earlier is None else compare(rows, earlier["results"])
    if json:
        screen.print_json({**report, **({"compared": compared} if earlier is not None else {})})
        return
    console = screen.answers_console()
    if rows:
        console.print(terminal.bench_table(rows))
    if report["load"]:
        console.print()
        console.print(terminal.load_table(report["load"]))
    if report["forward_cost"]:
        console.print()
        console.print(terminal.forward_cost_lines(report["forward_cost"]))
    for remark in _remarks(report, compared):
        screen.say(remark)
    if pictures:
        screen.say(f"Pictures: {', '.join(p.name for p in pictures)}")
    screen.say(f"In {folder / 'bench.json'}")


def _remarks(report: dict[str, Any], compared: list[dict[str, Any]]) -> list[str]:
    """What the reader of the table must know."""
    rows = report["results"]
    said = list(report["notes"])
    noisy = [row["label"] for row in rows if row["noise"] and row["noise"]["too_noisy"]]
    if noisy:
        said.append(
            "This machine is too noisy now: repetitions of one request differ too much for these speeds to count: "
            f"{', '.join(noisy)}."
        )
    elif report["rounds"] == 1:
        said.append("One round cannot tell the machine's noise: --rounds 2 can.")
    dear = [f"{row['label']} {row['watching_share']:.1%}" for row in rows if row["watching_too_dear"]]
    if dear:
        said.append(f"Measuring itself took more than 2 % of the time: {', '.join(dear)}. Leave out --trace.")
    if report["hardware"]["energy"] is None and rows:
        said.append("Energy: this machine does not tell.")
    for one in compared:
        low, high = one["earlier"]["low"], one["earlier"]["high"]
        verdict = "within" if one["within"] else "OUTSIDE"
        said.append(f"{one['label']}: {one['median']:.1f} tokens/s, {verdict} {low:.1f}-{high:.1f} of the earlier run")
    if any(not one["within"] for one in compared):
        said.append(
            "A speed outside of the earlier spread: another machine or version, or one too noisy to compare on."
        )
    return said


def _counts(text: str | None) -> list[int]:
    if text is None:
        return []
    counts = [whole_number(part.strip(), "--load", low=1) for part in text.split(",") if part.strip()]
    if not counts:
        raise SettingError("--load names no numbers. Give some, such as 1,2,4,8,16.")
    return sorted(set(counts))


def _earlier(path: str | None) -> dict[str, Any] | None:
    """An earlier report. Raises DataError."""
    if path is None:
        return None
    try:
        report = jsonlib.loads(Path(path).read_text(encoding="utf-8"))
        for row in report["results"]:
            _ = row["label"], row["tokens_per_second"]["low"], row["tokens_per_second"]["high"]
    except FileNotFoundError:
        raise DataError(f"There is no file {path}. Give a bench.json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no report of bench ({type(error).__name__}: {error}). Give a bench.json.") from None
    return report
