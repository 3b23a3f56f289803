"""trimode: one checkpoint, three ways to decode.

    import trimode
    model = trimode.load("smollm2-135m")
    print(model.generate("Why is the sky blue?", mode="self_spec").text)

Nothing heavy is imported until it is used, so that `trimode --help` answers at once.
"""

import os
from typing import TYPE_CHECKING, Any

# Read once, when torch is loaded. Its CPU threads otherwise wait by spinning, at the end of each of some hundred products a token:
# with one other busy process on two cores that made 0.8 tokens a second out of 21.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from trimode.errors import TrimodeError

if TYPE_CHECKING:
    from trimode.engine.language_model import LanguageModel, load
    from trimode.engine.request import Generated, Infilled, Request, Stats, StreamEvent

__version__ = "0.1.0"
__all__ = [
    "Generated",
    "Infilled",
    "LanguageModel",
    "Request",
    "Stats",
    "StreamEvent",
    "TrimodeError",
    "__version__",
    "load",
]

_HOMES = {
    "LanguageModel": "trimode.engine.language_model",
    "load": "trimode.engine.language_model",
    "Generated": "trimode.engine.request",
    "Infilled": "trimode.engine.request",
    "Request": "trimode.engine.request",
    "Stats": "trimode.engine.request",
    "StreamEvent": "trimode.engine.request",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trimode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
