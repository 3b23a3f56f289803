"""Which device, dtype and threads a model runs with, from what the user said and what the machine has."""

import os
from pathlib import Path

import torch

from trimode.errors import SettingError, nearest

__all__ = ["peak_memory", "pick_device", "pick_dtype", "set_threads"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def pick_device(name: str | torch.device | None) -> torch.device:
    """The named device, or the GPU if there is one. Raises SettingError for one that this machine lacks."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingError(f"device {str(name)!r} is not usable here: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise SettingError("device 'meta' holds no numbers. Use 'cpu' or 'cuda'.")
    return device


def pick_dtype(name: str | torch.dtype | None, stored: str) -> torch.dtype:
    """The named dtype, or the one that the checkpoint is stored in; float32 for block-quantised files."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name in (None, "auto"):
        return DTYPES.get(stored, torch.float32)
    name = _ALIASES.get(str(name), str(name))
    if name not in DTYPES:
        raise SettingError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def set_threads(count: int | None) -> None:
    """Threads of PyTorch's CPU kernels, for the whole process as PyTorch has it."""
    if count is None:
        return
    most = 4 * (os.cpu_count() or 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise SettingError(f"threads must be a whole number from 1 to {most} on this machine; got {count!r}.")
    torch.set_num_threads(count)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far: of the GPU's allocations there, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return None if peak is None else int(peak.split()[1]) * 1024
