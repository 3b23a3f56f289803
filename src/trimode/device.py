"""Which device, dtype and threads a model runs with, from what the user said and what the machine has.

torch is imported where it is needed: `trimode info` asks for the machine's memory without it.
"""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from trimode.errors import MachineTooSmallError, SettingError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "NATIVE_MISSING",
    "available_bytes",
    "check_memory",
    "forget_peak",
    "has_tiles",
    "memory_bytes",
    "native_kernels",
    "peak_memory",
    "pick_device",
    "pick_dtype",
    "processor",
    "resident_memory",
    "set_threads",
    "total_memory",
]

NATIVE_MISSING = "it was not built, for want of a C++ compiler; install one (g++ or clang++) and then trimode again."
DTYPES = ("float32", "bfloat16", "float16")
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def pick_device(name: "str | torch.device | None") -> "torch.device":
    """The named device, or the GPU if there is one. Raises SettingError for one that this machine lacks."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # torch's own words list two dozen devices that hardly anybody has
        raise SettingError(f"There is no device {str(name)!r}. Use 'cpu' or 'cuda'.") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise SettingError(f"device {str(name)!r} is not usable here: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise SettingError("device 'meta' holds no numbers. Use 'cpu' or 'cuda'.")
    return device


def pick_dtype(name: "str | torch.dtype | None", stored: str) -> "torch.dtype":
    """The named dtype, or the one that the checkpoint is stored in; float32 for block-quantised files."""
    import torch

    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name in (None, "auto"):
        return getattr(torch, stored) if stored in DTYPES else torch.float32
    name = _ALIASES.get(str(name), str(name))
    if name not in DTYPES:
        raise SettingError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}.{nearest(name, DTYPES)}")
    return getattr(torch, name)


def set_threads(count: int | None) -> None:
    """Threads of PyTorch's CPU kernels, for the whole process as PyTorch has it."""
    if count is None:
        return
    most = 4 * (os.cpu_count() or 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise SettingError(f"threads must be a whole number from 1 to {most} on this machine; got {count!r}.")
    import torch

    torch.set_num_threads(count)


def check_memory(name: str, num_bytes: int) -> None:
    """Raises MachineTooSmallError where so many bytes of weights can never lie in this machine's memory."""
    has = memory_bytes()
    if has is not None and num_bytes > has:
        raise MachineTooSmallError(
            f"The weights of {name} take {num_bytes / 1e9:.1f} GB in this dtype, and this machine has {has / 1e9:.1f} GB. "
            f"Use a narrower dtype or a smaller model; see trimode info."
        )


def has_tiles() -> bool:
    """Whether the native engine multiplies tiles of integers here; its int8 weights are then laid out for them."""
    return native_kernels()[:1] == ["amx"]


def native_kernels() -> list[str]:
    """Kernel sets of the native engine that this processor can run, the fastest first; empty where it was not built."""
    try:
        from trimode import _native
    except ImportError:
        return []
    return list(_native.kernels())


def memory_bytes() -> int | None:
    """Memory that this machine, or the container that we run in, has in all; None where the system does not say."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and some systems lack the names
        return None
    limit = _control_group("memory.max")
    return installed if limit is None else min(installed, limit)


def available_bytes() -> int | None:
    """Memory that a new process could take right now; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    return available if limit is None or used is None else min(available, max(limit - used, 0))


def _control_group(name: str) -> int | None:
    """A number of the Linux control group that a container sees as its own; None without one or without a limit."""
    file = Path("/sys/fs/cgroup") / name
    try:
        text = file.read_text().strip()
    except OSError:  # no control groups here, or not ours to read
        return None
    return int(text) if text.isdigit() else None


def peak_memory(device: "torch.device") -> int | None:
    """Bytes at most so far: of the GPU's allocations there, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def resident_memory(device: "torch.device | None" = None) -> int | None:
    """Bytes in use now, of the same; of this process, and without torch, if no device is given."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def forget_peak(device: "torch.device") -> None:
    """Start `peak_memory` anew, where the system lets us."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def _status_bytes(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(key)), None)
    return None if line is None else int(line.split()[1]) * 1024


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def total_memory(device: "torch.device") -> int | None:
    """Bytes that the GPU, or the machine, has; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()
