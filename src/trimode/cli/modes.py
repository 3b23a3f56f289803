"""Settings as the commands that compare take them: `ar,diffusion:threshold=0.7|0.9:block_length=8|16`."""

import itertools
from collections.abc import Sequence
from typing import Any

from trimode.cli import screen
from trimode.cli.options import parse
from trimode.decoding.settings import WITHOUT_MASK, check_for_mode, parse_settings
from trimode.errors import SettingError

__all__ = ["mode_settings", "modes_of"]


def modes_of(runner: Any, modes: Sequence[str], so: str) -> Sequence[str]:
    """These modes; of a checkpoint that names no mask token those that it has, and it is said that it is `so`."""
    if runner.config.mask_token_id is not None:
        return modes
    screen.say(f"{runner.name} names no mask token, so {so}.")
    return WITHOUT_MASK


def mode_settings(written: str, option: str = "--modes") -> list[tuple[str, dict[str, Any]]]:
    """Each mode with its knobs, every combination of alternatives, checked as far as it can be without a model.

    Raises SettingError, calling the option by its name.
    """
    chosen = [one for text in written.split(",") if text.strip() for one in _sweep(text.strip(), option)]
    if not chosen:
        raise SettingError(f"{option} names no mode; got {written!r}. Give at least one, such as ar.")
    for number, one in enumerate(chosen):
        if one in chosen[:number]:
            raise SettingError(f"{option} names {one[0]} twice with the same knobs. Leave one out.")
    return chosen


def _sweep(text: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    mode, *pairs = text.split(":")
    alternatives: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, values = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if not equals or not values:
            raise SettingError(f"{option} takes knobs as name=value; got {pair!r} in {text!r}.")
        if name in ("mode", "max_new_tokens", "seed"):
            raise SettingError(f"{name} is the same for all modes; got {pair!r} in {text!r}. Leave it out.")
        if name in alternatives:
            raise SettingError(f"{option} sets {name} twice in {text!r}. Put alternatives between bars: {name}=A|B.")
        alternatives[name] = [parse(name, value.strip()) for value in values.split("|")]
    chosen = []
    for values in itertools.product(*alternatives.values()):
        knobs = dict(zip(alternatives, values, strict=True))
        settings = parse_settings({**knobs, "mode": parse("mode", mode.strip())})
        if settings.mode != "auto":
            check_for_mode({**knobs, "mode": settings.mode}, settings.mode)
        chosen.append((settings.mode, knobs))
    return chosen
