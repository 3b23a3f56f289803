"""The inside of the sandbox: a program of its own, run by `sandbox` with nothing but Python's standard library.

It reads one line of JSON (folder, program, limits, a secret), gives up every right that the system lets it give up, tells which ones
those were, and runs the program. The secret is told back only if the program ran to its end.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

__all__: list[str] = []

NEW_NAMESPACES = 0x08000000 | 0x20000000 | 0x40000000  # interprocess communication, process ids, network
NEW_USER = 0x10000000
NO_NEW_PRIVILEGES, PARENT_DEATH_SIGNAL, KEEP_CAPABILITIES = 38, 1, 8
MAY_READ = 2
NOBODY = 65534
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
# Landlock's rights by the version of its interface that brought them
FILE_RIGHTS = {1: 0x1FFF, 2: 0x2000, 3: 0x4000, 5: 0x8000}
READING = 0x1 | 0x4 | 0x8  # execute, read a file, list a folder
NETWORK_RIGHTS, SCOPES = {4: 0x3}, {6: 0x3}  # TCP bind and connect; abstract sockets and signals of others


def _main() -> None:
    asked = json.loads(sys.stdin.readline())
    told = os.fdopen(os.dup(1), "w")
    folder = asked["folder"]
    libc = ctypes.CDLL(None, use_errno=True)
    held = {"namespaces": _leave_namespaces(libc)}
    if held["namespaces"] and (child := os.fork()):
        # process 1 of the new namespace dies with us, and everything in there with it
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    held["user"] = _become_nobody(libc)
    if sys.platform.startswith("linux"):
        libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    held["files"], held["network"] = _restrict_files(libc, folder)
    held["network"] = held["network"] or held["namespaces"]
    _limit(asked, held)
    print(json.dumps(held), file=told, flush=True)
    os.chdir(folder)
    source = Path(asked["program"]).read_text(encoding="utf-8")
    secret, output = asked["secret"], os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    asked.clear()
    os.dup2(output, 1)
    os.dup2(output, 2)
    end = _run(source, folder, told)
    with contextlib.suppress(OSError):
        print(json.dumps({"end": end, "secret": secret if end == "passed" else ""}), file=told, flush=True)
    os._exit(0)


def _run(source: str, folder: str, told: object) -> str:
    code = None
    try:
        code = compile(source, "program.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"does not compile: {type(error).__name__}: {error}"[:300]
    sys.addaudithook(_guard(os.path.realpath(folder), told))
    try:
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "passed"


def _guard(folder: str, told: object):
    """Python's own eyes, before the kernel's: they work on every system, and can say what was tried."""
    forbidden = {
        "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn",
        "ctypes.dlopen", "os.kill", "os.killpg", "os.chroot", "os.setxattr",
    }  # fmt: skip
    changing = {
        "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
        "os.utime", "shutil.move", "shutil.rmtree", "shutil.copyfile",
    }  # fmt: skip
    real, cwd, fspath, prefix = os.path.realpath, os.getcwd, os.fspath, folder + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    busy = False

    def outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        name = fspath(path)  # pyright: ignore[reportArgumentType, reportCallIssue]
        name = os.fsdecode(name)
        return not real(os.path.join(cwd(), name)).startswith(prefix)

    def refuse(what: str) -> None:
        os.write(told.fileno(), (json.dumps({"end": f"refused: {what}"}) + "\n").encode())  # pyright: ignore[reportAttributeAccessIssue]
        os._exit(1)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if event.startswith("socket.") and event != "socket.gethostname":
                refuse(f"the network ({event})")
            elif event in forbidden:
                refuse(event)
            elif event == "open" and isinstance(arguments[2], int) and arguments[2] & writing and outside(arguments[0]):
                refuse(f"writing to {arguments[0]!r}"[:200])
            elif event in changing and any(outside(a) for a in arguments[:2] if isinstance(a, str | bytes)):
                refuse(f"{event} outside of its folder")
        finally:
            busy = False

    return hook


def _leave_namespaces(libc: ctypes.CDLL) -> bool:
    """No network, no sight of other processes, and one kill that ends them all."""
    if not hasattr(libc, "unshare"):
        return False
    return libc.unshare(NEW_NAMESPACES) == 0 or libc.unshare(NEW_USER | NEW_NAMESPACES) == 0


def _become_nobody(libc: ctypes.CDLL) -> bool:
    """As root, be nobody from here on: nobody owns no files, and the number of its processes has a limit."""
    if os.geteuid() != 0:
        return False
    is_linux = sys.platform.startswith("linux")
    if is_linux:
        libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:  # a container may map no such user
        return False
    if is_linux:
        # Python's own library may lie where only root reads: then the right to read goes along, and no other
        kept = 0 if os.access(os.__file__, os.R_OK) else 1 << MAY_READ
        header, rights = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0)
        if libc.capset(header, rights) != 0:
            os._exit(1)
    return True


def _restrict_files(libc: ctypes.CDLL, folder: str) -> tuple[bool, bool]:
    """Landlock: reading anywhere, writing in the folder alone, no TCP. Which of files and network it holds."""
    if not sys.platform.startswith("linux"):
        return False, False
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False, False
    files, network, scopes = (
        sum(bits for first, bits in rights.items() if version >= first)
        for rights in (FILE_RIGHTS, NETWORK_RIGHTS, SCOPES)
    )
    attributes = struct.pack("QQQ", files, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        return False, False
    for path, rights in (("/", READING), (folder, files), ("/dev/null", files & (0x2 | 0x4 | 0x4000))):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, descriptor)
        if libc.syscall(ADD_RULE, rules, 1, rule, 0) != 0:
            return False, False
        os.close(descriptor)
    held = libc.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return held, held and network != 0


def _limit(asked: dict, held: dict) -> None:
    # a process without a namespace of its own could leave children behind: it gets none
    processes = asked["processes"] if held["namespaces"] else 0
    limits = {
        resource.RLIMIT_CPU: asked["cpu_s"],
        resource.RLIMIT_AS: asked["memory_bytes"],
        resource.RLIMIT_FSIZE: asked["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if hasattr(resource, "RLIMIT_NPROC"):
        limits[resource.RLIMIT_NPROC] = processes
    for kind, most in limits.items():
        # macOS refuses some of them; those are not what holds a program there
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    _main()
