"""Child processes that never outlive what started them, and never outgrow their memory."""

import ctypes
import os
import resource
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where `python -m pipelines…` finds itself
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it ended before we asked
        os._exit(1)


def limit_memory(more_bytes: int) -> None:
    """Lets the address space grow by at most `more_bytes` from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
