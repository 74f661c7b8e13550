"""A child process that never outlives its parent, whatever kills the parent.

Two independent means: the child's standard input is a pipe whose other end only the parent holds, so it reads an end
of file when the parent is gone; on Linux the kernel also sends SIGKILL, which works while the child is inside a long
native call. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Call first thing in a child that was started with `stdin=PIPE`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_exit_at_end_of_input, name="lifeline", daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def child_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def exit_text(code: int) -> str:
    """How a child ended, for messages: `exit code 1`, or `killed by SIGKILL`."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
