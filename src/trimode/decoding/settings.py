"""The knobs of one generation: names, ranges, and which of them do anything in which mode.

A setting without effect is an error: whoever turns a knob is told when it is not connected.
"""

import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from trimode.errors import SettingError, nearest

__all__ = [
    "MODES",
    "MOST_LOGPROBS",
    "UNMASKING",
    "WITHOUT_MASK",
    "Settings",
    "check_for_mode",
    "check_with_constraint",
    "mode_of",
    "parse_settings",
    "turns_a_mode",
]

MODES = ("auto", "ar", "diffusion", "self_spec")
WITHOUT_MASK = ("ar", "auto")
"""Modes of a checkpoint that names no mask token."""
UNMASKING = ("threshold", "fixed", "entropy_bound", "margin", "leftmost", "random")
MOST_BIAS = 10_000.0
MOST_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-4
LEAST_PENALTY = 0.01
LONGEST_QUADRATIC_BLOCK = 64
"""A quadratic round has B * (B + 1) inputs: 4,160 at 64."""
SELF_SPEC_KINDS = ("linear", "quadratic", "lookup")

_MODE_ALIASES = {"dlm": "diffusion", "linear_spec": "self_spec"}
_KNOB_ALIASES = {"block_size": "block_length", "remasking": "unmasking"}
_UNMASKING_ALIASES = {"low_confidence": "threshold"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to decode one prompt. None means: the checkpoint's or the mode's own default."""

    mode: str = "auto"
    """One of `MODES`."""
    max_new_tokens: int = 128
    """The answer's longest length in tokens, the end-of-text token included."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it before sampling."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this much probability."""
    top_k: int = 0
    """Sample among this many best tokens; 0 is all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the best one's probability."""
    seed: int | None = None
    """Seed of this request's own random numbers; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of its text."""
    ignore_eos: bool = False
    """End-of-text tokens do not end the answer."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already in prompt or answer lose score."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer holds already."""
    frequency_penalty: float = 0.0
    """The same, once for each time that the answer holds them."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these ids."""
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many likeliest ones at its place. Of the model itself, before temperature,
    bias and penalties. ar and self_spec: the autoregressive one, exactly. diffusion: that of the pass that filled the place."""
    max_thinking_tokens: int | None = None
    """After so many tokens without `</think>`, it is put in."""
    block_length: int | None = None
    """Tokens in a block. None: the checkpoint's; linear drafts of a converted model on a CPU: as long as lately paid, at most that."""
    threshold: float | None = None
    """diffusion: a masked position commits at this confidence (0.9). self_spec: above 0, drafts take several passes (0)."""
    unmasking: str = "threshold"
    """Which masked positions of a block commit in a step; one of `UNMASKING`."""
    entropy_bound: float | None = None
    """unmasking="entropy_bound": positions commit together while their joint entropy is below this many nats (0.1)."""
    max_denoising_steps: int | None = None
    """Cap on the passes over one block; what is still masked in the last one commits then."""
    editing_threshold: float | None = None
    """A filled token of the current block is replaced when another reaches this probability. None: never."""
    max_post_steps: int = 0
    """Extra passes that only revise, after a block is full."""
    self_spec_kind: str = "linear"
    """`linear`: draft, then verify. `quadratic`: verify and draft ahead in one forward. `lookup`: verify what the text itself,
    or the checkpoint's table of n-grams, suggests."""
    draft_lora: bool | None = None
    """Use the checkpoint's draft adapter; None: if there is one."""
    end_think_token_id: int | None = None
    """The token of `</think>`, for checkpoints without a tokenizer."""

    @property
    def has_penalty(self) -> bool:
        """Scores depend on the tokens before a place, not on the logits alone."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


_ONLY_IN: dict[str, tuple[str, ...]] = {
    "block_length": ("diffusion", "self_spec"),
    "threshold": ("diffusion", "self_spec"),
    "unmasking": ("diffusion",),
    "entropy_bound": ("diffusion",),
    "max_denoising_steps": ("diffusion",),
    "editing_threshold": ("diffusion",),
    "max_post_steps": ("diffusion",),
    "self_spec_kind": ("self_spec",),
    "draft_lora": ("diffusion", "self_spec"),
}


def parse_settings(knobs: Mapping[str, Any], defaults: Settings | None = None) -> Settings:
    """Settings out of keyword arguments, aliases understood, ranges checked. Raises SettingError in one line."""
    known = {f.name for f in fields(Settings)}
    values: dict[str, Any] = {}
    for name, value in knobs.items():
        own = _KNOB_ALIASES.get(name, name)
        if own not in known:
            raise SettingError(f"Unknown knob {name!r}.{nearest(name, known | set(_KNOB_ALIASES))}")
        if own in values:
            raise SettingError(f"{own} is given twice (as {name!r} too). Keep one.")
        values[own] = value
    _coerce(values)
    settings = replace(defaults or Settings(), **values)
    _check_ranges(settings)
    _check_block(settings)
    for name in values:
        _check_effect(name, settings)
    return settings


def check_for_mode(given: Mapping[str, Any], mode: str) -> None:
    """Refuses knobs that do nothing in `mode`. `given`: the knobs that the user turned, by any name."""
    for name, value in given.items():
        own = _KNOB_ALIASES.get(name, name)
        if value is None:
            continue
        modes = _ONLY_IN.get(own)
        if modes is not None and mode not in modes:
            raise SettingError(
                f"{own} has no effect in mode {mode!r}; it belongs to {' and '.join(modes)}. Leave it out."
            )


def mode_of(given: Mapping[str, Any]) -> str | None:
    """The one mode that has all of these knobs, where some belong to one mode only; None: there is none, or no such knob."""
    each = [_ONLY_IN.get(_KNOB_ALIASES.get(name, name)) for name, value in given.items() if value is not None]
    alone = {modes for modes in each if modes is not None and len(modes) == 1}
    return alone.pop()[0] if len(alone) == 1 else None


def turns_a_mode(given: Mapping[str, Any]) -> bool:
    """Whether one of these knobs belongs to some modes only."""
    return any(value is not None and _KNOB_ALIASES.get(name, name) in _ONLY_IN for name, value in given.items())


def check_with_constraint(given: Mapping[str, Any], settings: Settings) -> None:
    """Refuses knobs that contradict a constraint on the answer. `given`: the knobs that the user turned, by any name."""
    if settings.ignore_eos:
        raise SettingError("ignore_eos contradicts a grammar, whose end is the answer's end. Leave one of them out.")
    if settings.max_thinking_tokens is not None:
        raise SettingError(
            "max_thinking_tokens contradicts a grammar, which holds from the first token. Leave one out."
        )
    if settings.editing_threshold is not None:
        raise SettingError(
            "editing_threshold contradicts a grammar: what was filled decides what may follow. Leave one out."
        )
    if settings.unmasking not in ("threshold", "leftmost"):
        raise SettingError(
            f"unmasking={settings.unmasking!r} contradicts a grammar, under which a block fills from the left. Leave it out."
        )


def _coerce(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Integral | Real) and not isinstance(value, int | float):  # NumPy's
            with suppress(OverflowError):  # what is no number here is told as it was given
                values[name] = int(value) if isinstance(value, Integral) else float(value)
    mode = values.get("mode")
    if isinstance(mode, str):
        values["mode"] = _MODE_ALIASES.get(mode, mode)
    policy = values.get("unmasking")
    if isinstance(policy, str):
        values["unmasking"] = _UNMASKING_ALIASES.get(policy, policy)
    if "stop" in values:
        stop = values["stop"]
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        stop = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
        if not all(isinstance(s, str) and s for s in stop):
            raise SettingError(f"stop must be one or more non-empty strings; got {values['stop']!r}.")
        values["stop"] = stop
    if values.get("logit_bias") is not None:
        try:
            values["logit_bias"] = {operator.index(k): float(v) for k, v in dict(values["logit_bias"]).items()}
        except (TypeError, ValueError, OverflowError):
            raise SettingError(f"logit_bias must map token ids to numbers; got {values['logit_bias']!r}.") from None


def _check_ranges(s: Settings) -> None:
    _one_of("mode", s.mode, (*MODES, *_MODE_ALIASES))
    _one_of("unmasking", s.unmasking, UNMASKING)
    _one_of("self_spec_kind", s.self_spec_kind, SELF_SPEC_KINDS)
    _whole("max_new_tokens", s.max_new_tokens, 1)
    _whole("top_k", s.top_k, 0)
    _whole("max_post_steps", s.max_post_steps, 0)
    for name in ("block_length", "max_denoising_steps"):
        if getattr(s, name) is not None:
            _whole(name, getattr(s, name), 1, 4096)
    if s.max_thinking_tokens is not None:
        _whole("max_thinking_tokens", s.max_thinking_tokens, 0)
    if s.end_think_token_id is not None:
        _whole("end_think_token_id", s.end_think_token_id, 0)
    if s.seed is not None:
        _whole("seed", s.seed, 0, 2**63 - 1)
    _number("temperature", s.temperature, 0, 100)
    if 0 < s.temperature < LEAST_TEMPERATURE:
        raise SettingError(f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}; got {s.temperature}.")
    _number("top_p", s.top_p, 0, 1, above=True)
    _number("min_p", s.min_p, 0, 1)
    _number("repetition_penalty", s.repetition_penalty, LEAST_PENALTY, 100)
    for name in ("presence_penalty", "frequency_penalty"):
        _number(name, getattr(s, name), -2, 2)
    if s.logprobs is not None:
        _whole("logprobs", s.logprobs, 0, MOST_LOGPROBS)
    for name in ("threshold", "editing_threshold"):
        if getattr(s, name) is not None:
            _number(name, getattr(s, name), 0, 1)
    if s.entropy_bound is not None:
        _number("entropy_bound", s.entropy_bound, 0, 1000)
    for name in ("ignore_eos", "draft_lora"):
        if not isinstance(getattr(s, name), bool | None):
            raise SettingError(f"{name} must be true or false; got {getattr(s, name)!r}.")
    for token, bias in (s.logit_bias or {}).items():
        if not abs(bias) <= MOST_BIAS:
            raise SettingError(f"logit_bias of token {token} must be from -{MOST_BIAS:g} to {MOST_BIAS:g}; got {bias}.")


def _check_block(s: Settings) -> None:
    if s.self_spec_kind == "quadratic" and (s.block_length or 0) > LONGEST_QUADRATIC_BLOCK:
        raise SettingError(
            f"block_length must be at most {LONGEST_QUADRATIC_BLOCK} with self_spec_kind='quadratic'; got {s.block_length}."
        )


def _check_effect(name: str, s: Settings) -> None:
    """Knobs that another knob disconnects."""
    if name == "max_post_steps" and s.max_post_steps > 0 and s.editing_threshold is None:
        raise SettingError("max_post_steps has no effect without editing_threshold. Set both, or neither.")
    if name == "entropy_bound" and s.entropy_bound is not None and s.unmasking != "entropy_bound":
        raise SettingError(
            f"entropy_bound has no effect with unmasking={s.unmasking!r}. Set unmasking='entropy_bound'."
        )
    if name == "threshold" and s.threshold is not None and s.unmasking in ("fixed", "entropy_bound", "random"):
        raise SettingError(f"threshold has no effect with unmasking={s.unmasking!r}. Leave one of them out.")
    if name == "threshold" and s.threshold is not None and s.self_spec_kind != "linear":
        raise SettingError(f"threshold has no effect with self_spec_kind={s.self_spec_kind!r}. Leave one of them out.")
    if name == "draft_lora" and s.draft_lora is not None and s.self_spec_kind == "lookup":
        raise SettingError("draft_lora has no effect with self_spec_kind='lookup'. Leave one of them out.")
    if name == "end_think_token_id" and s.end_think_token_id is not None and s.max_thinking_tokens is None:
        raise SettingError("end_think_token_id has no effect without max_thinking_tokens. Set both, or neither.")
    if name in ("top_p", "top_k", "min_p") and s.temperature == 0 and getattr(s, name) != getattr(Settings(), name):
        raise SettingError(f"{name} has no effect at temperature 0. Set a temperature, or leave {name} out.")


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        hint = nearest(value, options) if isinstance(value, str) else ""
        raise SettingError(
            f"{name} must be one of {', '.join(o for o in options if o not in _MODE_ALIASES)}; got {value!r}.{hint}"
        )


def _whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingError(f"{name} must be a whole number from {least} to {most:,}; got {value!r}.")


def _number(name: str, value: Any, least: float, most: float, *, above: bool = False) -> None:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not least <= value <= most or (above and value == least):
        low = f"above {least:g}" if above else f"from {least:g}"
        raise SettingError(f"{name} must be a number {low} to {most:g}; got {value!r}.")
