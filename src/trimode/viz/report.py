"""`docs/results.md` out of the reports in `docs/results/`: `python -m trimode.viz.report docs/results docs/results.md`.

Nothing in that page is written by hand: a figure that is not in a committed report cannot stand in it. Pictures are drawn beside the
reports.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimode.errors import DataError
from trimode.viz.scores import eval_table, light_table

__all__ = ["draw_pictures", "read_reports", "results_page"]

Report = Mapping[str, Any]


def read_reports(folder: Path) -> dict[str, Report]:
    """The reports of `bench`, `tune`, `eval` and `sol` in a folder, by their names. Raises DataError."""
    reports: dict[str, Report] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read: {error}. Put a report of bench, tune, eval or sol there."
            ) from None
        if not isinstance(report, dict) or not any(key in report for key in SECTIONS):
            raise DataError(f"{path} is no report of bench, tune, eval or sol. Put other files elsewhere.")
        if "budget" not in report and not {"hardware", "versions"} <= report.keys():
            raise DataError(f"{path} names no hardware and versions, and its figures hold for no machine.")
        reports[path.stem] = report
    if not reports:
        raise DataError(f"{folder} holds no reports. Copy a bench.json or tune.json there.")
    return reports


def results_page(reports: Mapping[str, Report]) -> str:
    """The document."""
    parts = [
        "# Results",
        "Made by `make results` from the reports in `docs/results/`; a test keeps it current. Edit nothing here.",
        "Tokens a second are medians over requests with their quartiles, prefill included; tokens per forward are sums over sums; "
        "prompt tokens and warm-up never count. *times ar* compares request by request with the same engine's `ar` in the same "
        "interleaved run. *equal to ar* is the share of answers equal, token for token, to that `ar`'s: an engine that computes in "
        "other numbers need not agree. *memory* is weights and working memory, without the interpreter.",
    ]
    for name, report in reports.items():
        parts += next(section for key, section in SECTIONS.items() if key in report)(name, report)
    return "\n\n".join(parts) + "\n"


def _benchmarked(name: str, report: Report) -> list[str]:
    rows = report["results"]
    parts = [f"## {name}: {report['model']}, {report['dtype']}", _conditions(report), _by_setting(rows)]
    categories = list(dict.fromkeys(c for row in rows for c in row["by_category"]))
    if len(categories) > 1:
        parts += ["Tokens a second (times ar) by kind of prompt:", _by_category(rows, categories)]
    if report["forward_cost"]:
        parts += [_forward_cost(report["forward_cost"])]
    if report["load"]:
        parts += ["Requests in flight, through the engine; tokens a second of all together:", _by_load(report["load"])]
    pictures = [
        p for p in ("tokens_per_second", "acceptance_by_position", "forward_cost", "load") if _is_drawn(p, report)
    ]
    parts.append(" ".join(f"![{p.replace('_', ' ')}](results/{name}/{p}.png)" for p in pictures))
    return parts


def _is_drawn(picture: str, report: Report) -> bool:
    return {
        "tokens_per_second": bool(report["results"]),
        "acceptance_by_position": any(row["acceptance_by_position"] for row in report["results"]),
        "forward_cost": bool(report["forward_cost"]),
        "load": bool(report["load"]),
    }[picture]


def _tuned(name: str, report: Report) -> list[str]:
    rows = [
        [
            f"**{p['label']}**" if p["label"] == report["chosen"] else p["label"],
            f"{p['tokens_per_second']:.1f}",
            f"{p['tokens_per_forward']:.2f}",
            f"{p['quality']:.3f}",
            f"{p['agreement_with_ar']['share_equal']:.0%}" if p["agreement_with_ar"] else "",
        ]
        for p in sorted(report["points"], key=lambda p: -p["tokens_per_second"])
    ]
    areas = ", ".join(f"{mode} {area:.0f}" for mode, area in report["aup"].items())
    return [
        f"## {name}: {report['model']} tuned, {report['dtype']}",
        _conditions(report),
        f"Quality is {report['quality_is']}; at least {report['least_quality']:.3f} was asked for, and **{report['chosen']}** is the "
        f"fastest setting with it. Area under quality over tokens per forward (AUP): {areas}.",
        _table(["setting", "tokens/s", "tokens/forward", "quality", "equal to ar"], rows),
        f"![frontier](results/{name}/frontier.png)",
    ]


def _evaluated(name: str, report: Report) -> list[str]:
    head = f"## {name}: {report['model']}, {report['dtype']}, graded"
    return [
        head,
        f"{_machine(report)} Scores in percent with their standard errors.",
        _of_table(eval_table(report["results"])),
    ]


def _light(name: str, report: Report) -> list[str]:
    told = (
        f"Tokens a forward of the real policy and of an ideal sampler, by block length and kind of prompt; "
        f"{report['max_new_tokens']} tokens at most, {report['budget']} states of a block looked at. Counts of forwards, whatever "
        "the machine."
    )
    return [
        f"## {name}: {report['model']}, {report['dtype']}, speed of light",
        told,
        _of_table(light_table(report["results"])),
    ]


def _of_table(table: Table) -> str:
    """A table of the terminal, as Markdown."""
    head = [str(column.header).replace("\n", " ") for column in table.columns]
    return _table(head, list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)))


def _conditions(report: Report) -> str:
    """Machine, versions, commit, and what must be known of the run."""
    told = [
        _machine(report),
        f"{len(report['prompts'])} prompts, {report['max_new_tokens']} tokens at most, {report['rounds']} rounds, "
        f"seed {report['seed']}.",
    ]
    told += [f"{note}." for note in report.get("notes", [])]
    rows = report.get("points") or report["results"]
    noisy = [row["label"] for row in rows if row["noise"] and row["noise"]["too_noisy"]]
    if noisy:
        told.append(f"**The machine was too noisy for the speeds of {', '.join(noisy)} to count.**")
    if report["partial"]:
        told.append("**The run was stopped: these are the requests until then.**")
    return " ".join(told)


def _machine(report: Report) -> str:
    hardware, versions = report["hardware"], report["versions"]
    processor = (
        hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads of {hardware['cores']} cores"
    )
    told = [
        f"{processor}; {hardware['system']}.",
        ", ".join(f"{name} {version}" for name, version in versions.items() if name != "commit") + ".",
        f"Commit {versions.get('commit', 'unknown')}.",
    ]
    return " ".join(told)


def _by_setting(rows: Sequence[Report]) -> str:
    head = ["setting", "tokens/s", "quartiles", "times ar", "tokens/forward", "with prefill", "a round", "first token"]
    cells = [
        [
            row["label"],
            _middle(row["tokens_per_second"], "median", ".1f"),
            f"{row['tokens_per_second']['low']:.1f}-{row['tokens_per_second']['high']:.1f}",
            _middle(row["times_ar"], "median", ".2f"),
            _middle(row["decode_tpf"], "total", ".2f"),
            _middle(row["e2e_tpf"], "total", ".2f"),
            _middle(row["acceptance_length"], "total", ".2f"),
            _middle(row["first_token_seconds"], "median", ".2f", " s"),
            "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
            "" if row["joules_per_token"] is None else f"{row['joules_per_token']:.2f}",
            "" if row["agreement_with_ar"] is None else f"{row['agreement_with_ar']['share_equal']:.0%}",
        ]
        for row in rows
    ]
    return _table([*head, "memory", "joules/token", "equal to ar"], cells)


def _by_category(rows: Sequence[Report], categories: Sequence[str]) -> str:
    cells = []
    for row in rows:
        line = [row["label"]]
        for category in categories:
            figures = row["by_category"].get(category)
            speed = None if figures is None else figures["tokens_per_second"]
            times = None if figures is None else figures["times_ar"]
            line.append(_middle(speed, "median", ".1f") + ("" if times is None else f" ({times['median']:.2f})"))
        cells.append(line)
    return _table(["setting", *categories], cells)


def _forward_cost(cost: Report) -> str:
    head = ["positions in a forward", *map(str, cost["positions"])]
    rows = [
        ["milliseconds", *(f"{1000 * s:.1f}" for s in cost["seconds"])],
        ["times one position, paired", *(f"{ratio:.2f}" for ratio in cost["times_one"])],
    ]
    return f"A forward over T positions behind {cost['cached']} cached ones:\n\n" + _table(head, rows)


def _by_load(rows: Sequence[Report]) -> str:
    every = sorted({row["concurrency"] for row in rows})
    cells = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of = {row["concurrency"]: row["tokens_per_second"] for row in rows if row["label"] == label}
        cells.append([label, *(_middle(of.get(num), "median", ".1f") for num in every)])
    return _table(["setting", *map(str, every)], cells)


def _middle(figure: Report | None, key: str, form: str, unit: str = "") -> str:
    return "" if figure is None else f"{figure[key]:{form}}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns that nothing stands in."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [
        [head[i] for i in kept],
        ["---" if i == 0 else "---:" for i in kept],
        *([row[i] for i in kept] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SECTIONS = {"points": _tuned, "forward_cost": _benchmarked, "tasks": _evaluated, "budget": _light}
"""How a report is told, by a key that only its kind has."""


def draw_pictures(reports: Mapping[str, Report], folder: Path) -> None:
    """The pictures of each report, in a folder of its name."""
    from trimode.viz.plots import bench_pictures, tune_picture

    for name, report in reports.items():
        draw = tune_picture if "points" in report else bench_pictures if "forward_cost" in report else None
        if draw is not None:
            (folder / name).mkdir(exist_ok=True)
            draw(report, folder / name)


if __name__ == "__main__":
    found = read_reports(Path(sys.argv[1]))
    draw_pictures(found, Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(results_page(found), encoding="utf-8")
