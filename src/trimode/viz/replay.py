"""A trace, looked at: line by line in the terminal, or as one HTML page that needs nothing but a browser.

`decoding.trace` wrote it; here it is plain data that anybody may have written, so every value is checked before it is drawn.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.text import Text

from trimode.errors import DataError
from trimode.viz.terminal import MASK, harmless

__all__ = ["Forward", "Replay", "forward_line", "page", "read_trace", "standing"]

PAGE = Path(__file__).parent / "replay.html"
PLACE = "{{DATA}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One forward of one request."""

    kind: str
    block: int
    seconds: float
    inputs: int
    accepted: int | None
    committed: list[list[Any]]
    """[place, id, probability or null] of each token that became final."""
    canvas: list[list[Any]]
    """[place, id or null for a mask] of each tentative token, after the forward."""
    rejected: list[list[Any]]
    """[place, id] of each draft that the verification threw away."""
    revised: list[list[Any]]
    """[place, the id before] of each tentative token that changed."""


@dataclass(slots=True)
class Replay:
    """The requests of a trace, and the texts of their tokens."""

    requests: dict[int, list[Forward]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def text_of(self, token: int) -> str:
        """A token as people read it; its number where the checkpoint has no tokenizer."""
        return self.texts.get(token, f" {token}")


def read_trace(path: Path) -> Replay:
    """The trace in a file. Raises DataError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}. Give one that --trace wrote.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8, so it is no trace. Give one that --trace wrote.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read as a trace: {error}. Give one that --trace wrote.") from None
    replay = Replay()
    canvases: dict[int, dict[int, int | None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _record(line, where)
        request = record["request"]
        before = canvases.get(request, {})
        after = {place: token for place, token, *_ in (*record["canvas"], *record["committed"])}
        rejected = {place for place, _ in record["rejected"]}
        revised = [
            [place, old]
            for place, old in before.items()
            # a verification replaces what it rejects: that is no revision
            if old is not None and after.get(place, old) not in (None, old) and record["accepted"] is None
            if place not in rejected
        ]
        canvases[request] = dict(record["canvas"])
        replay.texts |= {int(token): text for token, text in record["texts"].items()}
        replay.requests.setdefault(request, []).append(
            Forward(
                **{name: record[name] for name in ("kind", "block", "seconds", "inputs", "accepted")},
                **{name: record[name] for name in ("committed", "canvas", "rejected")},
                revised=revised,
            )
        )
    if not replay.requests:
        raise DataError(f"{path} holds no forwards. Give a file that --trace wrote.")
    return replay


def _record(line: str, where: str) -> dict[str, Any]:
    """One record, whole and of the right types."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). Give a file that --trace wrote.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a record of a forward. Give a file that --trace wrote.")
    optional = {"inputs": 0, "canvas": [], "rejected": [], "texts": {}, "accepted": None}
    record = {**optional, **record}
    sound = {
        "request": lambda v: _is_count(v),
        "block": lambda v: _is_count(v),
        "step": lambda v: _is_count(v),
        "inputs": lambda v: _is_count(v),
        "kind": lambda v: isinstance(v, str),
        "seconds": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1e9,
        "accepted": lambda v: v is None or _is_count(v),
        "committed": lambda v: _are_places(v, 3) and all(place[1] is not None for place in v),
        "canvas": lambda v: _are_places(v, 2),
        "rejected": lambda v: _are_places(v, 2) and all(place[1] is not None for place in v),
        "texts": lambda v: (
            isinstance(v, dict) and all(k.isascii() and k.isdigit() and isinstance(t, str) for k, t in v.items())
        ),
    }
    for name, is_sound in sound.items():
        if name not in record:
            raise DataError(f"{where}: there is no `{name}`. Give a file that --trace wrote.")
        if not is_sound(record[name]):
            raise DataError(f"{where}: `{name}` makes no sense: {str(record[name])[:60]!r}.")
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _are_places(value: Any, length: int) -> bool:
    """A list of [place, id or null] or of [place, id, probability or null]."""
    if not isinstance(value, list):
        return False
    for place in value:
        if not isinstance(place, list) or len(place) != length or not _is_count(place[0]):
            return False
        if place[1] is not None and not _is_count(place[1]):
            return False
        if length == 3 and place[2] is not None and not isinstance(place[2], int | float):
            return False
    return True


# ---- in the terminal ----------------------------------------------------------------------------------------------------------


def forward_line(replay: Replay, number: int, forward: Forward) -> Text:
    """One line: which forward, what it cost, and what it did. Colours say only what the signs say too."""
    line = Text(f"{number:>4}  {forward.kind:<9}{forward.inputs:>4} in {1000 * forward.seconds:>8.1f} ms  ")
    if forward.committed:
        line.append("+", style="bold green")
    for _, token, _ in forward.committed:
        line.append(_shown(replay.text_of(token)), style="green")
    if forward.rejected:
        line.append(" -", style="bold red")
        line.append(_shown("".join(replay.text_of(token) for _, token in forward.rejected)), style="red strike")
    if forward.revised:
        line.append(f" ~{len(forward.revised)} revised", style="yellow")
    if forward.canvas:
        line.append(" [", style="dim")
        for _, token in forward.canvas:
            line.append(
                MASK if token is None else _shown(replay.text_of(token)), style="dim" if token is None else "cyan"
            )
        line.append("]", style="dim")
    return line


def standing(replay: Replay, forwards: Sequence[Forward]) -> Text:
    """The answer as it stands after these forwards: final text, then the last one's canvas."""
    last = forwards[-1]
    view = Text("".join(harmless(replay.text_of(t)) for f in forwards[:-1] for _, t, _ in f.committed))
    for _, token, _ in last.committed:
        view.append(harmless(replay.text_of(token)), style="green")
    changed = {place for place, _ in last.revised}
    for place, token in last.canvas:
        style = "dim" if token is None else "yellow" if place in changed else "cyan"
        view.append(MASK if token is None else _shown(replay.text_of(token)), style=style)
    return view


def _shown(text: str) -> str:
    return harmless(text).replace("\n", "⏎")


# ---- as a page ----------------------------------------------------------------------------------------------------------------


def page(replay: Replay, title: str) -> str:
    """One self-contained HTML document. No text of the trace is ever markup in it."""
    requests = [_for_page(replay, number, forwards) for number, forwards in replay.requests.items()]
    data = json.dumps({"requests": requests, "texts": replay.texts}, ensure_ascii=False, separators=(",", ":"))
    # inside a script element only these could end it
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = PAGE.read_text(encoding="utf-8")
    template = template.replace("<title>trimode trace</title>", f"<title>{html.escape(title)} - trimode trace</title>")
    head, tail = template.split(PLACE)
    return head + data + tail


def _for_page(replay: Replay, number: int, forwards: list[Forward]) -> dict[str, Any]:
    places = [p[0] for f in forwards for p in (*f.committed, *f.canvas, *f.rejected)] or [0]
    words = "".join(replay.text_of(token) for f in forwards for _, token, _ in f.committed)
    return {
        "number": number,
        "title": " ".join(words.split())[:50],
        "first": min(places),
        "places": max(places) - min(places) + 1,
        "forwards": [{each.name: getattr(f, each.name) for each in fields(f)} for f in forwards],
    }
