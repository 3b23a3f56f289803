"""What a request takes beside time, memory and energy, and what machine and versions the figures hold for."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trimode
from trimode.device import forget_peak, peak_memory, pick_device, processor, resident_memory

__all__ = ["Meters", "machine", "num_threads", "resident_bytes"]

RAPL = Path("/sys/class/powercap")
PEERS = ("transformers", "llama-cpp-python")


class Meters:
    """Read before and after each request. What the machine does not tell is None, never a guess."""

    def __init__(self) -> None:
        self._packages = [path for path in sorted(RAPL.glob("intel-rapl:[0-9]*")) if path.name.count(":") == 1]
        self._packages = [path / "energy_uj" for path in self._packages if _number_in(path / "energy_uj") is not None]
        self._gpu = None if self._packages else _nvml()
        self._memory_before: int | None = None
        self._energy_before: float | None = None

    @property
    def energy_source(self) -> str | None:
        """`rapl` (the processor), `nvml` (the graphics card), or None."""
        return "rapl" if self._packages else "nvml" if self._gpu is not None else None

    def begin(self) -> None:
        """A request starts."""
        forget_peak(pick_device(None))
        self._memory_before = resident_bytes()
        self._energy_before = self._energy()

    def end(self) -> tuple[int | None, float | None]:
        """Bytes that memory rose by at most, and joules, since `begin`."""
        energy, peak = self._energy(), peak_memory(pick_device(None))
        rise = None if peak is None or self._memory_before is None else max(0, peak - self._memory_before)
        # the counter wraps around now and then: such a request has no figure
        sound = energy is not None and self._energy_before is not None and energy >= self._energy_before
        return rise, energy - self._energy_before if sound else None  # pyright: ignore[reportOperatorIssue]

    def _energy(self) -> float | None:
        """Joules since some time in the past."""
        if self._packages:
            counts = [count for path in self._packages if (count := _number_in(path)) is not None]
            return sum(counts) / 1e6 if len(counts) == len(self._packages) else None
        return None if self._gpu is None else self._gpu()


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # the machine does not tell, or not everybody
        return None


def _nvml() -> Any:
    """A function that reads the card's energy in joules; None without a card or without nvidia-ml-py."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # cards before Volta count no energy
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def resident_bytes() -> int | None:
    """Memory in use now: the GPU's allocations where there is one, otherwise this process's resident memory."""
    return resident_memory(pick_device(None))


def machine(model: Any = None) -> dict[str, Any]:
    """The hardware and the versions that figures hold for. model: the one that was measured, which says its threads."""
    import torch

    versions = {"trimode": trimode.__version__, "python": platform.python_version(), "torch": torch.__version__}
    commit = _commit()
    if commit is not None:
        versions["commit"] = commit
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": num_threads(model),
        "kernels": getattr(getattr(model, "forward", None), "kernels", "torch"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "energy": Meters().energy_source,
        "system": platform.platform(),
    }
    return {"hardware": hardware, "versions": versions}


def num_threads(model: Any = None) -> int:
    """CPU threads of a model's forwards; of PyTorch's where it does not say."""
    import torch

    return getattr(getattr(model, "forward", None), "threads", None) or torch.get_num_threads()


def _commit() -> str | None:
    """The commit that this code is checked out at, `-dirty` if files differ from it; None for an installed package."""
    source = Path(__file__).resolve()
    git = ["git", "-C", str(source.parent)]
    try:
        # a package installed into somebody's repository is not that repository's code
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True, timeout=10)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
