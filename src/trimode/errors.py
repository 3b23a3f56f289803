"""Every exception that trimode raises on purpose.

A user's mistake raises a `TrimodeError`; the command line turns it into one line and exit code 2. Each class is also the
built-in exception that a caller would expect (ValueError, LookupError or RuntimeError), so plain `except ValueError` works too.
The message says the fault, the value and the remedy.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ChatTemplateError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ContextLengthError",
    "DataError",
    "EngineContractError",
    "GrammarError",
    "MachineTooSmallError",
    "MeasurementError",
    "MissingMaskTokenError",
    "PromptError",
    "QueueFullError",
    "RunStateError",
    "SettingError",
    "TrainingError",
    "TrimodeError",
    "UnsupportedModelError",
    "nearest",
]


class TrimodeError(Exception):
    """Base of all errors that trimode raises on purpose."""


class SettingError(TrimodeError, ValueError):
    """A knob is unknown, out of range, or without effect in the chosen mode."""


class PromptError(TrimodeError, ValueError):
    """A prompt is empty, of the wrong type, or holds ids outside the vocabulary."""


class ContextLengthError(PromptError):
    """Prompt and answer together do not fit the model's context."""


class CheckpointError(TrimodeError, ValueError):
    """A checkpoint's files are damaged, incomplete or contradictory."""


class CheckpointNotFoundError(CheckpointError, LookupError):
    """Nothing that can be loaded lies at the given place."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but of an architecture that trimode does not run."""


class DataError(TrimodeError, ValueError):
    """A file of prompts or training documents is missing, empty or malformed."""


class MachineTooSmallError(TrimodeError, RuntimeError):
    """The weights can never fit into this machine's memory."""


class MissingMaskTokenError(TrimodeError, LookupError):
    """A decoder that needs masks was asked of a checkpoint that names no mask token."""


class ChatTemplateError(TrimodeError, RuntimeError):
    """The checkpoint's chat template could not render these messages."""


class GrammarError(TrimodeError, ValueError):
    """A grammar cannot be read, is too large, or no answer of this checkpoint can match it."""


class QueueFullError(TrimodeError, RuntimeError):
    """The engine serves and queues as many requests as it may."""


class RunStateError(TrimodeError, RuntimeError):
    """A training run's folder belongs to another run, or its state cannot be read or written."""


class TrainingError(TrimodeError, RuntimeError):
    """Training cannot go on: a loss that is no number, or settings that do not fit together."""


class MeasurementError(TrimodeError, RuntimeError):
    """A benchmark's counts contradict one another, so its figures would mislead; nothing is reported."""


class EngineContractError(TrimodeError, RuntimeError):
    """A decoder broke one of the engine's contract lines: a bug in trimode or in a decoder of yours, not in the input."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ` Did you mean 'x'?` for the known name that is `name` mistyped or cut short, or the empty string."""

    def plain(word: str) -> str:
        return word.lstrip("-").lower()  # the dashes of an option are no likeness

    spellings = {plain(word): word for word in known}
    typed = plain(name)
    # below the cutoff are other words: of four letters two alike would do at one half, such as fast and auto
    found = difflib.get_close_matches(typed, spellings, n=1, cutoff=0.65)
    if not found and len(typed) >= 3:
        found = [word for word in spellings if word.startswith(typed)][:1]
    return f" Did you mean {spellings[found[0]]!r}?" if found else ""
