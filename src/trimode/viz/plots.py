"""Pictures of a benchmark, as PNG files: plain data in, files out.

matplotlib is optional: without it the figures are in the JSON all the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "acceptance_by_position",
    "bench_pictures",
    "forward_cost",
    "frontier",
    "throughput_by_load",
    "tokens_per_second",
    "tune_picture",
]

COLOURS = {"ar": "#6b7075", "diffusion": "#d98a1f", "self_spec": "#2f9e66", "auto": "#4a86d8"}
PEER = "#b9a3c9"
LONGEST_LABEL = 34


def bench_pictures(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every picture that a benchmark's report has the figures for. Raises ImportError without matplotlib."""
    made = []

    def make(draw: Any, data: Any, name: str) -> None:
        draw(data, folder / name, _title(report))
        made.append(folder / name)

    rows = report["results"]
    if rows:
        make(tokens_per_second, rows, "tokens_per_second.png")
    if any(row["acceptance_by_position"] for row in rows):
        make(acceptance_by_position, rows, "acceptance_by_position.png")
    if report.get("forward_cost"):
        make(forward_cost, report["forward_cost"], "forward_cost.png")
    if report.get("load"):
        make(throughput_by_load, report["load"], "load.png")
    return made


def tune_picture(report: Mapping[str, Any], folder: Path) -> Path:
    """The frontier of a tuning run. Raises ImportError without matplotlib."""
    path = folder / "frontier.png"
    frontier(report["points"], path, _title(report), chosen=report["chosen"], least=report["least_quality"])
    return path


def tokens_per_second(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A bar a setting, its median with the quartiles over requests."""
    figure, axes = _figure(height=1.1 + 0.42 * len(rows))
    for y, row in enumerate(reversed(rows)):
        speed = row["tokens_per_second"]
        colour = COLOURS.get(row["mode"], PEER) if row["engine"] == "trimode" else PEER
        below, above = speed["median"] - speed["low"], speed["high"] - speed["median"]
        axes.barh(y, speed["median"], color=colour, height=0.66, xerr=[[below], [above]], ecolor="#00000088", capsize=3)
        axes.text(speed["high"], y, f"  {speed['median']:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_short(row["label"]) for row in reversed(rows)])
    axes.set_xlabel("tokens a second: median, and quartiles over requests")
    axes.set_xlim(0, 1.15 * max(row["tokens_per_second"]["high"] for row in rows))
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.2)
    figure.savefig(path, dpi=120)


def acceptance_by_position(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Share of rounds that accepted the draft at each position; a line a setting."""
    figure, axes = _figure(height=3.6)
    for row in rows:
        shares = row["acceptance_by_position"]
        if shares:
            dashed = "--" if row["mode"] == "auto" else "-"  # it lies on the line of the mode that it stands for
            at = range(1, len(shares) + 1)
            axes.plot(at, shares, dashed, marker="o", markersize=4, label=_short(row["label"]))
    axes.set(xlabel="position in the draft", ylabel="rounds that accepted it", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def forward_cost(cost: Mapping[str, Any], path: Path, title: str) -> None:
    """Milliseconds of a forward over T positions, and how often one position's cost that is."""
    figure, axes = _figure(height=3.6)
    positions, taken = cost["positions"], [1000 * s for s in cost["seconds"]]
    axes.plot(positions, taken, marker="o", color=COLOURS["self_spec"])
    for T, each, ratio in zip(positions, taken, cost["times_one"], strict=True):
        axes.annotate(f"x {ratio:.2f}", (T, each), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(positions, [str(T) for T in positions])
    axes.set(
        xlabel=f"positions in a forward, {cost['cached']} cached", ylabel="milliseconds", ylim=(0, 1.2 * max(taken))
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def throughput_by_load(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Tokens a second of all requests together, by how many are in flight; a line a setting."""
    figure, axes = _figure(height=3.6)
    every = sorted({row["concurrency"] for row in rows})
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = sorted((row for row in rows if row["label"] == label), key=lambda row: row["concurrency"])
        speeds = [row["tokens_per_second"] for row in mine]
        middle = [speed["median"] for speed in speeds]
        spread = [
            [m - speed["low"] for m, speed in zip(middle, speeds, strict=True)],
            [speed["high"] - m for m, speed in zip(middle, speeds, strict=True)],
        ]
        at = [row["concurrency"] for row in mine]
        axes.errorbar(at, middle, yerr=spread, marker="o", capsize=3, label=_short(label), color=COLOURS.get(label))
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(n) for n in every])
    axes.set(xlabel="requests in flight", ylabel="tokens a second, together")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def frontier(points: Sequence[Mapping[str, Any]], path: Path, title: str, *, chosen: str, least: float) -> None:
    """Quality against tokens per forward and against tokens a second: the two frontiers, which differ.

    Each point has `label`, `mode`, `quality`, `tokens_per_forward`, `tokens_per_second`; `least` is the quality asked for.
    """
    figure, panels = _figure(width=11, height=4.6, columns=2)
    for axes, key, name in zip(
        panels, ("tokens_per_forward", "tokens_per_second"), ("tokens per forward", "tokens a second"), strict=True
    ):
        for point in points:
            is_chosen = point["label"] == chosen
            axes.scatter(
                point[key],
                point["quality"],
                s=110 if is_chosen else 32,
                marker="*" if is_chosen else "o",
                color=COLOURS.get(point["mode"], PEER),
                zorder=3,
            )
        best = _upper_hull(points, key)
        axes.plot([p[key] for p in best], [p["quality"] for p in best], color="#00000055", linewidth=1, zorder=1)
        for i, point in enumerate(best):
            axes.annotate(
                " ".join([point["mode"], *(str(value) for value in point["settings"].values())]),
                (point[key], point["quality"]),
                textcoords="offset points",
                xytext=(0, 7 if i % 2 == 0 else -13),
                ha="center",
                fontsize=7,
            )
        axes.axhline(least, color="#cf4a3c", linewidth=0.8, linestyle="--")
        axes.set(xlabel=name, ylabel="quality")
        axes.margins(x=0.2, y=0.12)
        axes.grid(alpha=0.2)
    seen = dict.fromkeys(point["mode"] for point in points)
    handles = [panels[0].scatter([], [], color=COLOURS.get(mode, PEER), label=mode) for mode in seen]
    panels[0].legend(handles=handles, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _upper_hull(points: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """The points that no other one beats in both, from slow to fast."""
    best: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (-p[key], -p["quality"])):
        if not best or point["quality"] > best[-1]["quality"]:
            best.append(point)
    return best[::-1]


def _figure(*, width: float = 8, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _title(report: Mapping[str, Any]) -> str:
    hardware = report["hardware"]
    where = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
    return f"{report['model']} · {report['dtype']} · {where}"


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
