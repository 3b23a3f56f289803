"""Tables of what was evaluated. Each figure stands with its standard error; they fit 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["eval_table", "light_table", "likelihood_table", "quantization_table"]


def light_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tokens a forward of the real policy and of the ideal one, by block length and category."""
    table = _table("blocks", "n")
    for name in ("diffusion\nreal", "ideal", "proven", "self_spec\nreal", "ideal"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    previous = None
    for row in rows:
        if previous not in (None, row["block_length"]):
            table.add_section()
        previous = row["block_length"]
        d, s = row["diffusion"], row["self_spec"]
        diffusion = ["", "", ""]
        if d is not None:
            diffusion = [*_figures(d, "real_per_forward", "ideal_per_forward"), f"{d['proven']:.0%}"]
        self_spec = ["", ""] if s is None else _figures(s, "real_per_forward", "ideal_per_forward")
        table.add_row(f"{row['block_length']:>2} {row['category']}", str(row["prompts"]), *diffusion, *self_spec)
    return table


def eval_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a task and setting: its score, what it cost, and its difference to `ar` on the same samples."""
    table = _table("task")
    table.columns[0].no_wrap = True
    table.columns[0].vertical = "top"
    table.add_column("setting", min_width=9, overflow="fold")
    for name in ("n", "score", "minus ar", "in part", "tokens/\nforward", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["task"]):
            table.add_section()
        previous = row["task"]
        difference = row["minus_ar"]
        table.add_row(
            row["task"],
            row["setting"],
            str(row["n"]),
            _percent(row["score"]),
            "" if difference is None else _percent(difference, signed=True),
            "\n".join(f"{name} {100 * part['value']:.0f}" for name, part in row["parts"].items()),
            _figure(row["decode_tpf"]),
            f"{row['tokens_per_second']['value']:.1f}",
        )
    return table


def likelihood_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a group of texts: nats a token, exact and bounded."""
    table = _table("texts of")
    table.columns[0].no_wrap = True
    for name in ("texts", "tokens", "ar\nnats/token", "diffusion >=\nnats/token", "error by\nits draws", "gap"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(
            row["group"],
            str(row["texts"]),
            f"{row['tokens']:,}",
            _figure(row["ar_per_token"]),
            _figure(row["bound_per_token"]),
            f"±{row['bound_draw_error']:.3f}",
            _figure(row["gap_per_token"]),
        )
    return table


def quantization_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a variant and view: how often its likeliest token is float32's, and how far its distribution is."""
    table = _table("variant")
    table.add_column("view", vertical="bottom")
    for name in ("places", "same token", "KL, nats", "worst KL", "ppl", "float32"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(
            row["variant"],
            row["view"],
            f"{row['places']:,}",
            _percent(row["agreement"]),
            f"{row['kl']['value']:.5f} ±{row['kl']['standard_error']:.5f}",
            f"{row['kl_worst']:.3f}",
            "" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
            "" if row["perplexity"] is None else f"{row['reference_perplexity']:.3f}",
        )
    return table


def _table(*left: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    for number, name in enumerate(left):
        table.add_column(name, vertical="bottom", justify="right" if number else "left")
    return table


def _figures(row: Mapping[str, Any], *names: str) -> list[str]:
    return [_figure(row[name]) for name in names]


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    error = figure.get("standard_error")
    return f"{figure['value']:.2f}" + ("" if error is None else f" ±{error:.2f}")


def _percent(figure: Mapping[str, Any], *, signed: bool = False) -> str:
    error = figure["standard_error"]
    value = f"{100 * figure['value']:{'+' if signed else ''}.1f}"
    return value if error is None else f"{value} ±{100 * error:.1f}"
