"""Reading numbers off tensors that may lie on a device.

Who must know numbers yields the tensors that hold them and is sent them as lists. So whoever runs several such functions reads the
tensors of all at once: a device is waited for once, however many ask.
"""

from collections.abc import Generator, Iterable
from types import GeneratorType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Reading", "read", "together"]

Result = TypeVar("Result")
Reading = Generator[list[Tensor], list[Any], Result]
"""Yields tensors and is sent, for each of them, what its `tolist()` gives."""


def together(functions: Iterable[Reading[Result] | Result]) -> Reading[list[Result]]:
    """What each of them returns; those that read do it at the same times. What is no such function stands for its own result."""
    results: list[Any] = list(functions)
    running = {i: one for i, one in enumerate(results) if isinstance(one, GeneratorType)}
    told: dict[int, Any] = dict.fromkeys(running)
    while running:
        wanted: dict[int, list[Tensor]] = {}
        for i, one in list(running.items()):
            try:
                wanted[i] = one.send(told[i])
            except StopIteration as end:
                results[i] = end.value
                del running[i]
        if wanted:
            numbers = iter((yield [tensor for tensors in wanted.values() for tensor in tensors]))
            told = {i: [next(numbers) for _ in tensors] for i, tensors in wanted.items()}
    return results


def read(function: Reading[Result] | Result) -> Result:
    """What it returns, once it was sent all that it wants to know."""
    if not isinstance(function, GeneratorType):
        return cast(Result, function)
    told: Any = None
    while True:
        try:
            wanted = function.send(told)
        except StopIteration as end:
            return end.value
        told = _numbers(wanted)


def _numbers(tensors: list[Tensor]) -> list[Any]:
    """Each tensor's numbers. Of those on a device, in one copy."""
    there = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if len(there) < 2:
        return [tensor.tolist() for tensor in tensors]
    # ids and bfloat16 too are themselves in float64
    is_one_kind = len({tensor.dtype for tensor in there}) == 1
    line = torch.cat([tensor.flatten() if is_one_kind else tensor.flatten().double() for tensor in there]).cpu()
    parts = iter(line.split([tensor.numel() for tensor in there]))
    return [
        tensor.tolist() if tensor.device.type == "cpu" else next(parts).view(tensor.shape).to(tensor.dtype).tolist()
        for tensor in tensors
    ]
