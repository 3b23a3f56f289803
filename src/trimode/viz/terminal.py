"""Renderables for the terminal: the filling block, the line of statistics, the tables.

Pure functions from plain data (strings, numbers, dicts) to rich's objects. They print nothing and import no model;
colours say only what the words say too, so that nothing is lost in a pipe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

__all__ = [
    "bench_table",
    "canvas_view",
    "demo_table",
    "forward_cost_lines",
    "harmless",
    "info_page",
    "load_table",
    "readable_bytes",
    "settled",
    "stats_line",
    "totals_line",
    "tune_table",
]

MASK = "░"
"""Stands for one token that is still masked."""


def harmless(text: str) -> str:
    """`text` with the control characters that could command a terminal replaced; line breaks and tabs stay."""
    return "".join(
        character if character in "\n\t" or not _is_control(character) else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def canvas_view(tail: str, canvas: Sequence[str | None] | None) -> Text:
    """The line being written: committed text plain, tentative tokens coloured, masks as dim blocks.

    `canvas` holds the tentative block's tokens as texts, None where a mask is still standing; None: no block is open.
    """
    view = Text(tail)
    for token in canvas or ():
        if token is None:
            view.append(MASK, style="dim")
        else:
            # A line break that may yet be taken back must not move the screen.
            view.append(harmless(token).replace("\n", "⏎"), style="cyan")
    return view


def settled(text: str, width: int) -> tuple[list[str], str]:
    """Split committed text into lines that will not change any more and the last line, which may still grow.

    A line break ends a line. A line that becomes wider than `width` columns ends at its last space, if it has one.
    """
    lines = [piece for line in text.split("\n") for piece in _wrapped(line, width)]
    return lines[:-1], lines[-1]


def stats_line(stats: Mapping[str, Any], finish_reason: str | None = None) -> Text:
    """One line: what an answer cost. `stats` is `Stats.as_dict()`."""
    parts = [
        " ".join(filter(None, (stats["mode"], stats.get("self_spec_kind")))),
        f"{stats['tokens']} tokens",
        f"{stats['seconds']:.2f} s",
        f"{stats['tokens_per_second']:.1f} tokens/s",
        f"{stats['nfe_prefill']} + {stats['nfe_decode']} forwards",
        f"{stats['decode_tpf']:.2f} tokens/forward",
    ]
    if stats.get("acceptance_length") is not None:
        parts.append(f"{stats['acceptance_length']:.2f} a round")
    if stats.get("revised"):
        parts.append(f"{stats['revised']} revised")
    if finish_reason == "length":
        parts.append("cut at the limit")
    return Text(" · ".join(parts), style="dim")


def totals_line(runs: Sequence[Mapping[str, Any]]) -> Text:
    """One line: what several answers cost together."""
    tokens = sum(run["tokens"] for run in runs)
    forwards = sum(run["nfe_prefill"] + run["nfe_decode"] for run in runs)
    seconds = sum(run["seconds"] for run in runs)
    answers = "1 answer" if len(runs) == 1 else f"{len(runs)} answers"
    parts = [answers, f"{tokens} tokens", f"{seconds:.2f} s", f"{forwards} forwards"]
    if seconds > 0:
        parts.insert(3, f"{tokens / seconds:.1f} tokens/s")
    return Text(" · ".join(parts), style="dim")


def demo_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a mode: what the same answer cost in each. Each run is `Stats.as_dict()`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("mode")
    for name in ("tokens", "forwards", "tokens/forward", "seconds", "tokens/s"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            str(run["mode"]),
            str(run["tokens"]),
            f"{run['nfe_prefill']} + {run['nfe_decode']}",
            f"{run['decode_tpf']:.2f}",
            f"{run['seconds']:.2f}",
            f"{run['tokens_per_second']:.1f}",
        )
    return table


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a setting of a benchmark: medians, and the quartiles of the speed. It fits 80 columns."""
    names = (
        "tokens/s",
        "quartiles",
        "times\nar",
        "tokens/\nforward",
        "tokens\na round",
        "first\ntoken",
        "equal\nto ar",
    )
    table = _setting_table(names)
    for row in rows:
        tpf, rounds = row["decode_tpf"], row["acceptance_length"]
        first, agreement = row["first_token_seconds"], row["agreement_with_ar"]
        table.add_row(
            row["label"],
            *_speed(row),
            "" if row["times_ar"] is None else f"{row['times_ar']['median']:.2f}",
            "" if tpf is None else f"{tpf['total']:.2f}",
            "" if rounds is None else f"{rounds['total']:.2f}",
            "" if first is None else f"{first['median']:.2f} s",
            "" if agreement is None else f"{agreement['share_equal']:.0%}",
        )
    return table


def tune_table(points: Sequence[Mapping[str, Any]], chosen: str, least: float) -> Table:
    """One row a setting, fastest first; a star marks the chosen one, brackets a quality below the least asked for."""
    table = _setting_table(("tokens/s", "tokens/\nforward", "quality", "equal\nto ar"))
    for point in sorted(points, key=lambda p: -p["tokens_per_second"]):
        quality, agreement = f"{point['quality']:.3f}", point["agreement_with_ar"]
        table.add_row(
            f"* {point['label']}" if point["label"] == chosen else f"  {point['label']}",
            f"{point['tokens_per_second']:.1f}",
            f"{point['tokens_per_forward']:.2f}",
            quality if point["quality"] >= least else f"({quality})",
            "" if agreement is None else f"{agreement['share_equal']:.0%}",
        )
    return table


def load_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a setting and number of requests in flight."""
    names = (
        "in\nflight",
        "tokens/s\ntogether",
        "quartiles",
        "tokens/\nforward",
        "first\ntoken",
        "request",
        "as\nalone",
    )
    table = _setting_table(names)
    for row in rows:
        table.add_row(
            row["label"],
            str(row["concurrency"]),
            *_speed(row),
            f"{row['tokens_per_forward']:.2f}",
            f"{row['first_token_seconds']['median']:.2f} s",
            f"{row['request_seconds']['median']:.2f} s",
            "" if row["equal_to_alone"] is None else f"{row['equal_to_alone']:.0%}",
        )
    return table


def _setting_table(names: Sequence[str]) -> Table:
    """Settings at the left, which may be long, and figures of these names."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("setting", vertical="bottom", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    return table


def _speed(row: Mapping[str, Any]) -> tuple[str, str]:
    """Tokens a second: their median, and their quartiles."""
    speed = row["tokens_per_second"]
    return f"{speed['median']:.1f}", f"{speed['low']:.1f}-{speed['high']:.1f}"


def forward_cost_lines(cost: Mapping[str, Any]) -> Text:
    """What a forward over T positions costs, three lines."""
    rows = (
        ("positions in a forward", [str(T) for T in cost["positions"]]),
        ("milliseconds", [f"{1000 * s:.1f}" for s in cost["seconds"]]),
        ("times one position, paired", [f"{ratio:.2f}" for ratio in cost["times_one"]]),
    )
    return Text("\n".join(f"{name:<28}" + "".join(f"{value:>9}" for value in values) for name, values in rows))


def info_page(facts: Mapping[str, Any], machine: Mapping[str, int | None]) -> Text:
    """What a checkpoint is and what running it takes, a line each; print it with `soft_wrap`, so that paths stay whole.

    `facts` is `checkpoint.describe()` with `runs_here` (dtype -> verdict) and `engine` added; `machine` has `memory_bytes` and
    `available_bytes`, None where the system does not say.
    """
    count = _grouped
    shape = f"{count(facts['layers'])} layers · width {count(facts['width'])} · {count(facts['heads'])} heads"
    rows: list[tuple[str, str | Text]] = [
        ("path", str(facts["path"])),
        ("family", str(facts["family"])),
        ("parameters", count(facts["parameters"])),
        ("weights", f"{readable_bytes(facts['weight_bytes'])}, {facts['dtype']}"),
        ("shape", f"{shape} · vocabulary {count(facts['vocab_size'])}"),
        ("context", f"{count(facts['context'])} tokens"),
        (
            "modes",
            ", ".join(facts["modes"]) + ("" if "diffusion" in facts["modes"] else ", auto with lookups in the text"),
        ),
        *_blocks(facts),
        ("adapter", _adapter(facts["adapter"])),
        ("n-grams", f"{_grouped(facts['ngram_contexts'])} contexts" if facts["ngram_contexts"] else "none"),
    ]
    needs = {dtype: readable_bytes(needed) for dtype, needed in facts["memory_bytes"].items()}
    widest = max(map(len, needs.values()), default=0)
    for number, (dtype, needed) in enumerate(needs.items()):
        verdict = facts["runs_here"].get(dtype, "")
        style = {"runs here": "green", "does not fit here": "red"}.get(verdict, "yellow")
        told = Text.assemble(f"{needed:>{widest}} in {dtype:<8}  ", (verdict, style))
        rows.append(("memory" if number == 0 else "", told))
    if machine["memory_bytes"] is not None:
        has, free = readable_bytes(machine["memory_bytes"]), machine["available_bytes"]
        rows.append(("here", f"{has} of memory" + ("" if free is None else f", {readable_bytes(free)} of it free")))
    engine = facts["engine"]
    by = "PyTorch" if engine["kernels"] is None else f"the native engine ({engine['kernels']})"
    rows.append(("on the CPU", f"in {engine['precision']} by {by}; {engine['why']}"))
    page = Text(str(facts["name"]), style="bold")
    for label, told in rows:
        line = Text.assemble("\n", (f"{label:<12}", "dim"), told)
        page = Text.assemble(page, line)
    return page


def readable_bytes(number: int) -> str:
    """A size as people write it: 98.2 MB. Decimal units, three digits."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    digits = 0 if size >= 99.95 or unit == "B" else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def _wrapped(line: str, width: int) -> list[str]:
    """`line` in pieces of at most `width` columns. What stands before the last piece does not depend on what follows."""
    pieces: list[str] = []
    while cell_len(line) > width:
        fits = 0
        columns = 0
        for character in line:
            columns += cell_len(character)
            if columns > width:
                break
            fits += 1
        space = line.rfind(" ", 1, fits + 1)
        cut = space + 1 if space > 0 else max(fits, 1)
        pieces.append(line[:cut].rstrip(" "))
        line = line[cut:]
    return [*pieces, line]


def _blocks(facts: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    if facts["mask_token_id"] is None:
        return [("blocks", "none: the checkpoint names no mask token")]
    position = {"self": "their own position", "next": "the next position"}.get(facts["block_predicts"], "?")
    trained = "yes" if facts["trained_for_blocks"] else "no: drafts are poor, though self_spec stays exact"
    return [
        ("blocks", f"{_grouped(facts['block_length'])} tokens predicting {position}, mask {facts['mask_token_id']}"),
        ("trained", trained),
    ]


def _adapter(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "none"
    return f"rank {adapter['rank']} · {_grouped(adapter['parameters'])} parameters · {', '.join(adapter['parts'])}"


def _grouped(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else str(number)


def _is_control(character: str) -> bool:
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0
