"""A training run on one page: a TOML file, checked before anything is loaded.

Every table is one dataclass; an unknown key is an error that names the nearest known one. Paths are relative to the recipe.
"""

import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trimode.errors import SettingError, nearest
from trimode.model.lora import ADAPTED_PARTS
from trimode.training.drafter import DrafterSettings
from trimode.training.joint import JointSettings
from trimode.training.objectives import ConversionSettings
from trimode.training.trainer import TrainSettings

__all__ = ["AdapterShape", "DataSettings", "Recipe", "Source", "make_recipe", "read_recipe"]

_MAY_CHANGE = (
    "steps",
    "decay",
    "floor",
    "save_every",
    "evaluate_every",
    "documents_per_forward",
    "shard",
    "recompute",
)
_TABLES = {"blocks": ("adapter",), "joint": ("joint", "diffusion"), "drafter": ("drafter",)}
"""Which objectives a table belongs to."""

ObjectiveName = Literal["adapter", "joint", "diffusion", "ar", "drafter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Documents and their weight in the mixture: a file, or a data set of the hub."""

    path: str | None = None
    """A JSONL file, also gzipped."""
    hub: str | None = None
    """A data set, `owner/name`; its rows hold what the lines of a file would: `messages`, `text`, or ids."""
    subset: str | None = None
    """hub: its configuration."""
    split: str | None = None
    """hub: `train` unless named."""
    limit: int | None = None
    """Only so many lines or rows, the first ones."""
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What it is called, wherever a file of it lies."""
        return Path(self.path).name if self.path is not None else str(self.hub)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """What is read."""

    sources: tuple[Source, ...]
    max_tokens: int = 512
    """Longer documents are cut."""
    held_out: int = 64
    """Documents kept aside for the evaluations, the last ones of the first source."""
    bad_lines: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """The LoRA that is trained."""

    rank: int = 64
    alpha: float = 64.0
    parts: tuple[str, ...] = ADAPTED_PARTS
    successor: int = 0
    """adapter: inner width of what lets drafts know the draft before them; 0: they do not."""
    initial: str | None = None
    """A directory with an exported adapter to begin from, instead of from no change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run."""

    base: str
    """What is trained: preset, directory, GGUF file or hub id."""
    objective: ObjectiveName
    data: DataSettings
    train: TrainSettings
    weights: Literal["lora", "full"] = "lora"
    """What is trained; `full` with the objectives joint, diffusion and ar."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What products are computed in; trained parameters are float32 always."""
    adapter: AdapterShape = field(default_factory=AdapterShape)
    blocks: ConversionSettings = field(default_factory=ConversionSettings)
    joint: JointSettings = field(default_factory=JointSettings)
    drafter: DrafterSettings = field(default_factory=DrafterSettings)
    block_length: int = 8
    """What the trained checkpoint decodes with unless told otherwise."""
    mask_token: str | None = None
    """What stands for a token that is not known yet, where the base names none: a token of its vocabulary or an id."""

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be continued; its length and how often it saves may change."""
        whole = asdict(self)
        for name in _MAY_CHANGE:
            whole["train"].pop(name)
        for name, objectives in _TABLES.items():
            if self.objective not in objectives:
                whole.pop(name)
        whole["data"]["sources"] = [
            {key: value for key, value in source.items() if value is not None}
            | ({} if source["path"] is None else {"path": Path(source["path"]).name})
            for source in whole["data"]["sources"]
        ]
        whole["base"] = Path(whole["base"]).name
        # choices that were not made are left out, so that a run begun before there was such a choice goes on
        whole["adapter"] = {key: value for key, value in whole["adapter"].items() if value is not None}
        return {key: value for key, value in whole.items() if value is not None}


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe with `table.key=value` changes (values as TOML). Raises SettingError naming the key."""
    if not path.is_file():
        raise SettingError(f"There is no recipe {str(path)!r}.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SettingError(f"{path} is not TOML: {error}.") from None
    return make_recipe(raw, path.parent, changes)


def make_recipe(raw: dict[str, Any], directory: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from its tables, paths relative to `directory`."""
    for change in changes:
        _apply(raw, change)
    missing: list[str] = []
    recipe = _build(Recipe, raw, "", missing)
    if missing:
        raise SettingError(f"The recipe lacks {', '.join(missing)}. Add what is missing; recipes/ holds examples.")
    for name, objectives in _TABLES.items():
        if name in raw and recipe.objective not in objectives:
            raise SettingError(f"[{name}] has no effect with objective = {recipe.objective!r}. Leave it out.")
    if recipe.weights == "full":
        if recipe.objective in ("adapter", "drafter"):
            raise SettingError(
                f"weights = 'full' does not go with objective = {recipe.objective!r}, which keeps its base."
            )
        if "adapter" in raw:
            raise SettingError("[adapter] has no effect with weights = 'full'. Leave it out.")
    unknown = [part for part in recipe.adapter.parts if part not in ADAPTED_PARTS]
    if unknown or not recipe.adapter.parts:
        raise SettingError(
            f"An adapter's parts are some of {', '.join(ADAPTED_PARTS)}; got {', '.join(unknown) or 'none'}."
        )
    if recipe.adapter.initial is not None and recipe.objective not in ("adapter", "drafter"):
        raise SettingError(f"adapter.initial has no effect with objective = {recipe.objective!r}. Leave it out.")
    for i, source in enumerate(recipe.data.sources):
        _check_source(source, f"data.sources[{i}]")
    sources = tuple(
        source if source.path is None else replace(source, path=str((directory / source.path).resolve()))
        for source in recipe.data.sources
    )
    base = directory / recipe.base
    initial = recipe.adapter.initial
    return replace(
        recipe,
        data=replace(recipe.data, sources=sources),
        base=str(base.resolve()) if base.exists() else recipe.base,
        adapter=replace(recipe.adapter, initial=initial and str((directory / initial).resolve())),
    )


def _check_source(source: Source, label: str) -> None:
    if (source.path is None) == (source.hub is None):
        raise SettingError(f"{label} needs a path (a JSONL file) or a hub (a data set), one of the two.")
    if source.hub is None and (source.subset is not None or source.split is not None):
        raise SettingError(f"{label}: subset and split belong to a data set of the hub and have no effect with a path.")
    if source.limit is not None and source.limit < 1:
        raise SettingError(f"{label}.limit must be at least 1; got {source.limit}.")


def _apply(raw: dict[str, Any], change: str) -> None:
    name, equals, written = change.partition("=")
    if not equals or not name:
        raise SettingError(f"--set takes path=value, such as train.steps=100; got {change!r}.")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written
    *tables, key = name.strip().split(".")
    at = raw
    for table in tables:
        at = at.setdefault(table, {})
        if not isinstance(at, dict):
            raise SettingError(f"--set {name}: {table!r} is no table.")
    at[key] = value


def _build(kind: Any, raw: Any, where: str, missing: list[str]) -> Any:
    """`raw` as the dataclass `kind`. What it must have and has not is added to `missing`, and then nothing is built."""
    if not isinstance(raw, Mapping):
        raise SettingError(f"{where or 'The recipe'} must be a table; got {raw!r}.")
    known = {f.name: f for f in fields(kind)}
    for key in raw:
        if key not in known:
            raise SettingError(f"Unknown key {f'{where}.{key}'.lstrip('.')!r} in the recipe.{nearest(key, known)}")
    hints = get_type_hints(kind)
    values = {}
    for name, f in known.items():
        label = f"{where}.{name}".lstrip(".")
        if name in raw:
            values[name] = _value(hints[name], raw[name], label, missing)
        elif f.default is MISSING and f.default_factory is MISSING:
            num_before = len(missing)
            if is_dataclass(hints[name]):
                _build(hints[name], {}, label, missing)
            if len(missing) == num_before:
                missing.append(label)
    return None if missing else kind(**values)


def _value(kind: Any, raw: Any, label: str, missing: list[str]) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _build(kind, raw, label, missing)
    if origin is Literal:
        if raw not in get_args(kind):
            raise SettingError(f"{label} must be one of {', '.join(map(str, get_args(kind)))}; got {raw!r}.")
        return raw
    if origin in (Union, types.UnionType):
        return _value(next(a for a in get_args(kind) if a is not type(None)), raw, label, missing)
    if origin is tuple:
        inner = get_args(kind)
        if not isinstance(raw, list):
            raise SettingError(f"{label} must be a list; got {raw!r}.")
        return tuple(_value(inner[0], item, f"{label}[{i}]", missing) for i, item in enumerate(raw))
    if kind is float and type(raw) in (int, float):
        return float(raw)
    if type(raw) is not kind:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise SettingError(f"{label} must be {words.get(kind, kind)}; got {raw!r}.")
    return raw
