"""`--modes` of the commands that compare: modes with commas between them, knobs behind colons."""

from typing import Any

from trimode.cli.options import parse
from trimode.decoding.settings import check_for_mode, parse_settings
from trimode.errors import SettingError

__all__ = ["mode_settings"]


def mode_settings(written: str) -> list[tuple[str, dict[str, Any]]]:
    """Each mode with its knobs, checked as far as it can be without a model. Raises SettingError."""
    chosen = [_one(text.strip()) for text in written.split(",") if text.strip()]
    if not chosen:
        raise SettingError(f"--modes names no mode; got {written!r}. Give at least one, such as ar.")
    for number, one in enumerate(chosen):
        if one in chosen[:number]:
            raise SettingError(f"--modes names {one[0]} twice with the same knobs. Leave one out.")
    return chosen


def _one(text: str) -> tuple[str, dict[str, Any]]:
    mode, *pairs = text.split(":")
    knobs: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--modes takes knobs as name=value; got {pair!r} in {text!r}.")
        if name in ("mode", "max_new_tokens", "seed"):
            raise SettingError(f"{name} is the same for all modes; got {pair!r} in {text!r}. Leave it out.")
        knobs[name] = parse(name, value)
    settings = parse_settings({**knobs, "mode": parse("mode", mode)})
    if settings.mode != "auto":
        check_for_mode({**knobs, "mode": settings.mode}, settings.mode)
    return settings.mode, knobs
