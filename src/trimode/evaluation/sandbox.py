"""Runs a program that a model wrote: without network, in a temporary folder, within limits, killed as a whole.

The kernel does the holding (namespaces and Landlock on Linux, resource limits everywhere); `sandbox_child` asks it to, and Python's
audit hooks stand before it to say what was tried. Where the kernel can hold neither files nor network, `require_confinement` refuses.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import MeasurementError, SettingError

__all__ = ["Limits", "Ran", "require_confinement", "run_program"]

CHILD = Path(__file__).with_name("sandbox_child.py")
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may take."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    """Of address space."""
    processes: int = 16
    """Threads count as processes."""
    file_bytes: int = 16 << 20
    """A single file."""
    folder_bytes: int = 64 << 20
    """All files together, looked at every 20 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a program ended."""

    passed: bool
    """It ran to its end without an exception."""
    end: str
    """In words: "passed", an exception, a limit, or what was refused."""
    seconds: float
    held: dict[str, bool]
    """What the kernel held: namespaces, user, files, network."""
    output: str = ""
    """The last 2,000 characters of what it printed."""


def run_program(source: str, limits: Limits | None = None) -> Ran:
    """Run Python source."""
    limits = Limits() if limits is None else limits
    with tempfile.TemporaryDirectory(prefix="trimode-", ignore_cleanup_errors=True) as name:
        outer = Path(name)
        folder = outer / "work"
        folder.mkdir()
        program = outer / "program.py"
        program.write_text(source, encoding="utf-8", errors="surrogateescape")
        if os.name == "posix" and os.geteuid() == 0:
            # it will run as nobody, who may write in its folder and read its program
            folder.chmod(0o777)
            outer.chmod(0o755)
            program.chmod(0o644)
        return _run(folder, program, limits)


def _run(folder: Path, program: Path, limits: Limits) -> Ran:
    secret = secrets.token_hex(16)
    asked = {
        "folder": str(folder),
        "program": str(program),
        "secret": secret,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
        "processes": limits.processes,
        "file_bytes": limits.file_bytes,
    }
    start = time.monotonic()
    told = program.with_name("told.txt")
    with told.open("wb") as answers:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)},
            start_new_session=True,
            close_fds=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                process.stdin.close()
            stopped = _wait(process, folder, start + limits.wall_s, limits)
        finally:
            # whatever it started is in its group or in its namespace, and dies with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    lines = _lines(told)
    held = lines[0] if lines and "end" not in lines[0] else {}
    last = lines[-1] if lines and "end" in lines[-1] else {}
    passed = stopped is None and last.get("secret") == secret
    end = stopped or ("passed" if passed else str(last.get("end", "")) or _ending(process.returncode))
    if not passed and end == "passed":
        end = "ended by itself before its tests did"
    return Ran(passed=passed, end=end, seconds=seconds, held=held, output=_output(folder / "output.txt"))


def _wait(process: subprocess.Popen, folder: Path, deadline: float, limits: Limits) -> str | None:
    """Until it ends, in which case None, or why it must."""
    while True:
        try:
            process.wait(POLL_S)
            return None
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                return f"killed: longer than {limits.wall_s:g} s"
            if _size(folder) > limits.folder_bytes:
                return f"killed: more than {limits.folder_bytes:,} bytes of files"


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                total += 4096 + _size(Path(entry.path))
            else:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def _lines(told: Path) -> list[dict[str, Any]]:
    lines = []
    # the program shares this file's descriptor if it looks for it: so only whole objects count, and the secret decides
    for line in told.read_bytes()[: 1 << 20].split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def _ending(status: int) -> str:
    # a signal arrives as its negative number, or as 128 and more through the process in between
    number = -status if status < 0 else 256 - status if status > 128 else 0
    too_long = "killed: too much processor time, or by the system"
    names = {signal.SIGKILL: too_long, signal.SIGXCPU: too_long}
    names[signal.SIGXFSZ] = "killed: a file too large"
    for known, words in names.items():
        if number == known:
            return words
    return f"ended by itself before its tests did (status {status})"


def _output(path: Path) -> str:
    try:
        if path.is_symlink():
            return ""
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 2000, 0))
            return file.read(2000).decode(errors="replace")
    except OSError:  # it deleted it, or never came so far
        return ""


def require_confinement() -> dict[str, bool]:
    """What the kernel holds here.

    Raises SettingError where it cannot keep a program from the network and from other files, MeasurementError where not even a harmless
    program runs.
    """
    ran = run_program("import collections, heapq, itertools, math, re, string, threading, typing\n")
    if not ran.passed:
        raise MeasurementError(f"The sandbox cannot run a harmless program here ({ran.end}). No code is graded.")
    if not (ran.held["files"] or ran.held["user"]) or not ran.held["network"]:
        missing = "the network" if not ran.held["network"] else "other files"
        raise SettingError(
            f"This system cannot keep a program from {missing} (no namespaces, no Landlock). Run it in a container that may be "
            "spoilt and add --trust-code, or leave humaneval out."
        )
    return ran.held
