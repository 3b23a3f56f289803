"""A run's loss and acceptance as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["training_curves"]


def training_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Loss by update, and below it what was measured on held-out documents. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held = [r for r in records if any(name.startswith("held_out_") for name in r)]
    names = [name for name in (held[-1] if held else {}) if name.startswith("held_out_")]
    figure = Figure(figsize=(8, 6 if names else 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if names else 1, 1, sharex=True, squeeze=False)[:, 0]
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    panels[0].plot(steps, losses, linewidth=0.7, alpha=0.4, color="tab:blue")
    panels[0].plot(steps, _smooth(losses), color="tab:blue")
    panels[0].set(ylabel="loss", title=title)
    for name in names:
        points = [(r["step"], r[name]) for r in held if name in r]
        panels[-1].plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("held_out_"))
    if names:
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        panels[-1].set_ylabel("on held-out documents")
    panels[-1].set_xlabel("update")
    for panel in panels:
        panel.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Running mean, unbiased at the start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
