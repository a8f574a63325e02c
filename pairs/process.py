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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent  # where `python -m pipelines…` finds itself
PR_SET_PDEATHSIG = 1
CGROUP = Path("/sys/fs/cgroup")


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def dies_with_us() -> Callable[[], None]:
    """What to hand to a `preexec_fn`: the child then ends when the thread that starts it does (Linux), and at once
    where this process has ended before. It acts between fork and exec, so no import of the child's comes first."""
    parent = os.getpid()
    return lambda: die_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """In the child: asks the kernel to kill it with its parent. `parent` is the id of the process that started it: a
    child that has another one by now (1, or a subreaper) is an orphan already, while a parent may well have id 1."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(more_bytes: int) -> None:
    """Lets this process's address space grow by at most `more_bytes` from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def watch_parent(parent: int) -> None:
    """Ends this process when its parent is another than `parent`: for a process that a library starts, perhaps from a
    thread that ends early, so that the kernel's signal would come too soon. Looked at each second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


@contextlib.contextmanager
def child(
    command: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
    folder: Path | None = None,
    keep: Sequence[int] = (),
    patience_s: float = 10.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command` while the block lasts; then asks it to end, and after `patience_s` makes it. It gets no input, and
    of our open files those in `keep`."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
        pass_fds=keep,
        preexec_fn=dies_with_us(),
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


def free_bytes() -> int:
    """Memory that may still be taken, by the machine and by this process's control group."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or `max`
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(told["inactive_file"]))  # files' pages, which go when room is needed
    return max(free, 0)
