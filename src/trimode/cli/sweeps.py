"""Lists of settings as `bench` and `tune` take them: `ar,diffusion:threshold=0.7|0.9:block_length=8|16`."""

import itertools
from typing import Any

from trimode.cli.options import KNOBS, parse
from trimode.decoding.settings import check_for_mode, parse_settings
from trimode.errors import SettingError

__all__ = ["settings_of"]

LIMITED_ELSEWHERE = ("max_new_tokens", "seed")


def settings_of(text: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    """Modes with their knobs, every combination of the alternatives between bars. Raises SettingError, naming `option`."""
    found = [one for part in text.split(",") if part.strip() for one in _sweep(part.strip(), option)]
    if not found:
        raise SettingError(f"{option} names no mode. Give some, such as ar,diffusion,self_spec.")
    for i, one in enumerate(found):
        if one in found[:i]:
            raise SettingError(f"{option} names {one[0]} with {one[1] or 'no knobs'} twice. Leave one of them out.")
    return found


def _sweep(text: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    mode, *pairs = text.split(":")
    mode = parse_settings({"mode": parse("mode", mode.strip())}).mode
    choices: list[list[tuple[str, Any]]] = []
    for pair in pairs:
        name, equals, values = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if not equals or not values:
            raise SettingError(f"{option} takes knobs as name=value; got {pair!r} in {text!r}.")
        if name == "mode" or (name in KNOBS and name in LIMITED_ELSEWHERE):
            raise SettingError(f"{option} cannot set {name}, which holds for all settings; got {text!r}.")
        if any(name == chosen[0][0] for chosen in choices):
            raise SettingError(f"{option} sets {name} twice in {text!r}. Put alternatives between bars: {name}=A|B.")
        choices.append([(name, parse(name, value.strip())) for value in values.split("|")])
    found = []
    for combination in itertools.product(*choices):
        knobs = dict(combination)
        parse_settings({**knobs, "mode": mode})
        if mode != "auto":
            check_for_mode(knobs, mode)
        found.append((mode, knobs))
    return found
