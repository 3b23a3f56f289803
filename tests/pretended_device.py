"""Tensors of the CPU that pretend to lie on another device: what a device would refuse raises, and what would wait for it is counted.

An operation of a tensor here and one there raises, as PyTorch does. Reading a number, a copy to the host, and a copy to the device that
may block (`torch.tensor(numbers, device=...)` is one) each wait for all that the device was given before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "Pretended", "pretended_device"]

DEVICE = torch.device("cuda:0")
_READS = {
    "tolist",
    "item",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__contains__",
    "numpy",
    "__array__",
    "equal",
    "allclose",
}
_INDEXED = {"__getitem__", "__setitem__"}
_MOVES = {"to", "cpu", "cuda"}
_waits: list[str] = []


class Pretended(Tensor):
    """One of them."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """What is made on the device, or sent there, pretends to be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return name if name != "__get__" else f"get {getattr(func, '__self__', None)}"


def _is_there(x: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(x, Pretended)


def _has_booleans(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(index))


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    if name in _MOVES:
        args = tuple(torch.device(x) if isinstance(x, str) else x for x in args)
    leaves = tree_leaves((args, kwargs))
    there = any(map(_is_there, leaves))
    asked = [x for x in leaves if isinstance(x, torch.device) and x.type == DEVICE.type]
    here = tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else x, (args, kwargs))
    whose: dict[int, Tensor] = {}

    def stripped(x: Any) -> Any:
        if not _is_there(x):
            return x
        found = x.as_subclass(Tensor)
        whose[id(found)] = x
        return found

    plain = tree_map(stripped, here)
    with torch._C.DisableTorchFunctionSubclass():
        if name in _READS and there:
            _waits.append(name)
            return func(*plain[0], **plain[1])
        if name in _MOVES and (there or asked):
            to_host = (there and any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves)) or name == "cpu"
            if to_host:
                _waits.append("to the host")
                return func(*plain[0], **plain[1])
            if asked and not there and not kwargs.get("non_blocking"):
                _waits.append("to the device")
            return func(*plain[0], **plain[1]).clone().as_subclass(Pretended)
        if asked and not there:
            if name in ("tensor", "as_tensor"):
                _waits.append("to the device")
            return func(*plain[0], **plain[1]).as_subclass(Pretended)
        if not there:
            return args[0] if name == "pin_memory" else func(*args, **kwargs)
        strangers = [x for x in leaves if isinstance(x, Tensor) and not _is_there(x)]
        if name in ("nonzero", "unique", "masked_select") or (name == "__getitem__" and _has_booleans(args[1])):
            _waits.append("how many there are")
        if name in _INDEXED:
            lists = any(isinstance(x, list) for x in tree_leaves(args[1], is_leaf=lambda x: isinstance(x, list)))
            if lists or any(x.dim() for x in strangers):
                _waits.append("an index to the device")
        elif strangers:
            raise RuntimeError(f"{name}: tensors of the CPU beside those of {DEVICE}.")
        found = func(*plain[0], **plain[1])
        # what gives back the very tensor (`x.float()` of floats) gives back the very tensor here too
        return tree_map(lambda x: whose.get(id(x), x.as_subclass(Pretended)) if isinstance(x, Tensor) else x, found)


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Every wait, by what waited, while this lasts."""
    _waits.clear()
    with _Factories():
        yield _waits
