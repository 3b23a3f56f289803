"""The command line: one small file a command, and nothing in it that a library user would miss.

`main` imports nothing heavy before it guards against Ctrl-C, so that a key pressed while Python is still loading ends
as quietly as one pressed in the middle of an answer. torch is imported by the commands that run a model, and only then.
"""

import os
import signal
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the program on the process's own arguments and exit with its status."""
    try:
        from trimode.cli.app import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    # From here on only the interpreter shuts down: a second Ctrl-C ends it at once instead of printing a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        # One rank of several: threads of PyTorch's messages do not always outlive the interpreter's end, and where they abort it
        # torchrun takes the run for failed and ends the others, which may still be writing.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)
