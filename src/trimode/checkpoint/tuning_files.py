"""What `auto` stands for, as `trimode tune` found it: the object `trimode.auto` of a generation_config.json.

Other programs read the same file for their sampling and leave our object alone; so do we with theirs.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimode.errors import CheckpointError

__all__ = ["GENERATION", "read_auto", "write_auto"]

GENERATION = "generation_config.json"
KEY, AUTO, TUNED = "trimode", "auto", "tuned"


def read_auto(generation: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The knobs that `auto` stands for, the mode among them; empty if nobody tuned. Whether they make sense is the engine's to say.

    Raises CheckpointError for an object of another shape.
    """
    ours = generation.get(KEY)
    if ours is None:
        return {}
    auto = ours.get(AUTO) if isinstance(ours, dict) else None
    if auto is None and isinstance(ours, dict):
        return {}
    if not isinstance(auto, dict) or not isinstance(auto.get("mode"), str):
        raise CheckpointError(
            f"{KEY}.{AUTO} in {where} must be an object with a mode; got {auto!r}. Run trimode tune again."
        )
    return dict(auto)


def write_auto(path: Path, auto: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Put the knobs, and how they were found, into a generation_config.json, made if need be; all else in it stays.

    Raises CheckpointError.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(whole, dict):
            raise CheckpointError(f"{path} is no object. Mend it, or remove it.")
        ours: Any = whole.get(KEY)
        whole[KEY] = {**(ours if isinstance(ours, dict) else {}), AUTO: dict(auto), TUNED: dict(tuned)}
        partly = path.with_suffix(".part")
        partly.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        os.replace(partly, path)  # a link into a download cache is replaced, not written through
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be written: {error}. Use --dry-run, and pass the setting yourself."
        ) from None
