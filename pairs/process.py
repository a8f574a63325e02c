"""Child processes that can't outlive their parent, however it ends, nor outgrow their memory.

On Linux the kernel is asked (prctl PR_SET_PDEATHSIG) to kill the child when its parent dies, SIGKILL included.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent  # where `python -m pipelines…` finds itself
PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Call it first thing in the child: the kernel then kills it when the thread that started it ends (Linux). `parent`
    is the id of the process that should be the parent; a child whose parent has gone already ends at once."""
    before = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != before or before == 1:
        os._exit(1)


def limit_memory(more_bytes: int) -> None:
    """Lets this process's address space grow by at most `more_bytes` from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def child(
    command: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
    folder: Path | None = None,
    patience_s: float = 10.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command` while the block lasts; then asks it to end, and after `patience_s` makes it."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
        preexec_fn=die_with_parent,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
