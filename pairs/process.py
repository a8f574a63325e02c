"""Child processes that can't outlive their parent, however it ends.

On Linux the kernel is asked (prctl PR_SET_PDEATHSIG) to kill the child when its parent dies, SIGKILL included.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Call in the child, first thing: the kernel then sends it SIGKILL when the parent thread's process ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the parent died before the call
            os._exit(1)


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
