"""The knobs of a generation as the command line offers them: one table for `generate`, `chat` and `/set`.

What a knob means, its range and the modes in which it has an effect are the library's business (`decoding.settings`, which
imports no torch, so that mistakes are told before a model is loaded). Here stands how a knob is written and explained. One
that the user did not give is not passed on, so that the library can refuse one without effect.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import typer

from trimode.decoding.settings import MODES, UNMASKING, Settings, check_for_mode, parse_settings
from trimode.errors import SettingError, nearest

__all__ = [
    "KNOBS",
    "Device",
    "Dtype",
    "Json",
    "Knob",
    "ModelName",
    "Quantize",
    "Stats",
    "Threads",
    "given",
    "parse",
    "takes_knobs",
    "whole_number",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """How one knob of a generation is written."""

    kind: Literal["int", "float", "word", "switch", "texts"]
    """A whole number, a number, one of a few words, on or off, or any number of texts."""
    help: str
    panel: str
    """The group of the help page that it stands in."""
    metavar: str = "N"
    negated: bool = False
    """A switch that is also written `--no-...`."""


def _decoding(kind: Literal["int", "float", "word"], metavar: str, help: str) -> Knob:
    return Knob(kind=kind, metavar=metavar, help=help, panel="Decoding")


def _sampling(kind: Literal["int", "float"], metavar: str, help: str) -> Knob:
    return Knob(kind=kind, metavar=metavar, help=help, panel="Sampling")


KNOBS: Mapping[str, Knob] = {
    "mode": _decoding("word", "MODE", f"How to decode: {', '.join(MODES)}; auto picks for this checkpoint."),
    "max_new_tokens": _decoding("int", "N", "Longest answer, in tokens."),
    "block_length": _decoding(
        "int",
        "N",
        "Tokens in a block; the checkpoint's own if not given (self_spec of a converted model on a CPU: as long as lately paid).",
    ),
    "threshold": _decoding(
        "float",
        "P",
        "diffusion: a masked position commits at this probability or above (0.9 if not given). "
        "self_spec: above 0, a draft takes several passes.",
    ),
    "unmasking": _decoding("word", "POLICY", f"diffusion: which masks a step fills: {', '.join(UNMASKING)}."),
    "entropy_bound": _decoding("float", "X", "diffusion, unmasking entropy_bound: the joint entropy, in nats (0.1)."),
    "max_denoising_steps": _decoding("int", "N", "diffusion: most denoising steps a block."),
    "editing_threshold": _decoding(
        "float", "P", "diffusion: revise a token of the current block when another reaches this probability."
    ),
    "max_post_steps": _decoding("int", "N", "diffusion: extra steps that only revise, after a block is full."),
    "self_spec_kind": _decoding(
        "word",
        "KIND",
        "self_spec: linear (two forwards a round), quadratic (one) or lookup (one; the text, or n-grams, draft).",
    ),
    "draft_lora": Knob(
        kind="switch", negated=True, panel="Decoding", help="Use the checkpoint's draft adapter, or do without."
    ),
    "temperature": _sampling("float", "T", "0 takes the likeliest token; above, tokens are drawn."),
    "top_p": _sampling("float", "P", "Draw from the fewest tokens that hold this much probability."),
    "top_k": _sampling("int", "N", "Draw from the N likeliest tokens."),
    "min_p": _sampling("float", "P", "Draw from tokens with at least P times the likeliest one's probability."),
    "seed": _sampling("int", "N", "Same seed, same answer."),
    "repetition_penalty": _sampling("float", "X", "Above 1, tokens that occurred become less likely."),
    "stop": Knob(
        kind="texts", metavar="TEXT", panel="Ending", help="End before this text; may be given several times."
    ),
    "ignore_eos": Knob(kind="switch", panel="Ending", help="Go on after the end-of-text token."),
    "max_thinking_tokens": Knob(kind="int", panel="Ending", help="End the model's thinking after N tokens."),
    "end_think_token_id": Knob(
        kind="int", metavar="ID", panel="Ending", help="What ends thinking, for checkpoints without a tokenizer."
    ),
}

# With these, no knob is disconnected by another one's default. The chat's /set checks one knob at a time: the one that
# connects it may come next.
_ALL_CONNECTED = Settings(temperature=1.0, editing_threshold=1.0)

ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="NAME", rich_help_panel="Model", help="Preset, directory, GGUF file or hub id."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="NAME", rich_help_panel="Model", help="float32, bfloat16, ...; chosen if not given."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="NAME",
        rich_help_panel="Model",
        help="int8 or none; int8 on the CPU if not given, unless the checkpoint is in float32.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", rich_help_panel="Model", help="cpu, cuda, ...; chosen if not given."),
]
Threads = Annotated[
    str | None,
    typer.Option("--threads", metavar="N", rich_help_panel="Model", help="CPU threads."),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel="Output", help="Print JSON, and nothing else, on standard output."),
]
Stats = Annotated[
    bool | None,
    typer.Option("--stats/--no-stats", rich_help_panel="Output", help="The line of statistics; on by default."),
]

Command = TypeVar("Command", bound=Callable[..., Any])


def takes_knobs(command: Command) -> Command:
    """Give `command`, written with `**knobs`, an option for every row of the table."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    knobs = [_as_parameter(name, knob) for name, knob in KNOBS.items()]
    # Model first, then the knobs, then how the answer is shown: the order in which the help page tells them.
    shown_last = [p for p in own if _panel(p) == "Output"]
    first = [p for p in own if p not in shown_last]
    # Keyword-only throughout: one that has a default may then stand before one that has none. typer calls by keyword.
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*first, *knobs, *shown_last)]
    command.__signature__ = signature.replace(parameters=keywords)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def given(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the knobs that the user gave as options, checked as far as it can be without a model.

    Raises SettingError.
    """
    values: dict[str, Any] = {}
    for name, written in knobs.items():
        if isinstance(written, bool):
            values[name] = written
        elif isinstance(written, list | tuple):
            if written:
                values[name] = list(written)
        elif written is not None:
            values[name] = _value(name, written, f"--{name.replace('_', '-')}")
    settings = parse_settings(values)
    if settings.mode != "auto":
        check_for_mode(values, settings.mode)
    return values


def parse(name: str, written: str) -> Any:
    """The value of the knob `name` as `written` after the chat's `/set`. Raises SettingError."""
    if name not in KNOBS:
        hint = nearest(name, KNOBS) or f" There are {', '.join(KNOBS)}."
        raise SettingError(f"Unknown knob {name!r}.{hint}")
    value = _value(name, written, name)
    connected = {"unmasking": "entropy_bound"} if name == "entropy_bound" else {}
    parse_settings({**connected, name: value}, _ALL_CONNECTED)
    return value


def whole_number(written: str, label: str, *, low: int) -> int:
    """The number that is `written`, `low` or more. Raises SettingError, calling it `label`."""
    value = _number(written, label, int)
    if value < low:
        raise SettingError(f"{label} must be {low} or more; got {written}.")
    return value


def _value(name: str, written: str, label: str) -> Any:
    """What is `written` for the knob `name`, of the right type; SettingError, calling the knob `label`, if it is not."""
    kind = KNOBS[name].kind
    if kind == "switch":
        words = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
        if written.lower() not in words:
            raise SettingError(f"{label} is on or off; got {written!r}.")
        return words[written.lower()]
    if kind == "texts":
        # There is no other way to type a line break into one line.
        return [written.replace("\\n", "\n").replace("\\t", "\t")]
    if kind == "word":
        return written.replace("-", "_")
    return _number(written, label, int if kind == "int" else float)


def _number(written: str, label: str, kind: type[int] | type[float]) -> Any:
    # The parser of the arguments would tell a mistyped number in its own words and forget what was typed: so numbers come
    # here as text, from the command line and from the chat alike.
    try:
        return kind(written)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise SettingError(f"{label} must be {wanted}; got {written!r}.") from None


def _as_parameter(name: str, knob: Knob) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    types = {"switch": bool, "texts": list[str]}
    annotation = Annotated[
        types.get(knob.kind, str) | None,
        typer.Option(
            f"--{dashed}/--no-{dashed}" if knob.negated else f"--{dashed}",
            metavar=None if knob.kind == "switch" else knob.metavar,
            rich_help_panel=knob.panel,
            help=_with_default(name, knob.help),
        ),
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_default(name: str, help: str) -> str:
    """`help` with the knob's default in brackets, unless it is off by default."""
    default = getattr(Settings(), name)
    if not default:
        return help
    return f"{help} [{default:g}]" if isinstance(default, float) else f"{help} [{default}]"


def _panel(parameter: inspect.Parameter) -> str | None:
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return next((getattr(option, "rich_help_panel", None) for option in metadata), None)
