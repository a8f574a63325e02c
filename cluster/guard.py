"""A child process for work that may kill its process: a decoder's segfault, a filter that takes all memory.

The parent asks it one call after another and survives its death: that is raised as `Crashed`, with the signal, and the
next question starts another child; after `DEATHS` in a row the fault isn't a pair's, and the run stops. It computes as
every worker does (one thread), dies with its parent, and is killed when it takes more than `SHARE` of the memory that
was free at its start, so that the kernel's choice of a victim never falls on the parent. Starting costs about 0.5 s,
and whatever the asked function loads.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil

from cluster.compute import call, result
from pairs.errors import PairmillError
from pairs.process import child, free_bytes

P = ParamSpec("P")
T = TypeVar("T")
DEATHS = 32
SHARE = 0.7
# torch and numpy read them when they load; importing torch to set its threads would cost 2 s.
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
LOOK_S = 0.05  # how often its memory is looked at
END_S = 5.0  # in which a process that has closed its pipe has ended


class Crashed(Exception):
    """The child died of a call: `crashed: SIGSEGV`."""


class Guard:
    """Runs functions in a child process while the block lasts. Function and arguments have to pickle."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._asked: tuple[subprocess.Popen[bytes], Connection, int] | None = None
        self._deaths = 0  # in a row

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """`function(*arguments)`, or what it raised; `Crashed` where the child died of it."""
        process, connection, limit = self._asked = self._asked or self._start()
        try:
            connection.send((function, arguments, named))
            while not connection.poll(LOOK_S):
                if psutil.Process(process.pid).memory_info().rss > limit:
                    process.kill()
            told = connection.recv_bytes()
        except (EOFError, ConnectionError, psutil.NoSuchProcess):
            self._deaths += 1
            cause = _cause(process)
            if self._deaths >= DEATHS:
                raise _broken(function, arguments, cause) from None
            raise Crashed(f"crashed: {cause}") from None
        finally:
            if process.poll() is not None:
                self._stop()
        self._deaths = 0
        return result(told, "a guarded process")  # type: ignore[no-any-return]

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection, int]:
        ours, theirs = Pipe()
        path = os.pathsep.join(place for place in sys.path if place)
        command = [sys.executable, "-m", "cluster.guard", str(theirs.fileno())]
        settings = ONE_THREAD | {"PYTHONPATH": path}
        opened = child(command, environment=settings, keep=(theirs.fileno(),), patience_s=0.1)
        process = self._stack.enter_context(opened)
        self._stack.enter_context(ours)
        theirs.close()
        try:
            ours.recv_bytes()
        except (EOFError, ConnectionError):
            cause = _cause(process)
            self._stop()
            raise PairmillError(
                expected="a process for work that may crash to start",
                found=f"{cause} before it was asked anything; its message, if any, stands above",
                remedy="free memory, or mend the libraries, then run the same command again: what is done stays",
            ) from None
        return process, ours, int(SHARE * free_bytes())

    def _stop(self) -> None:
        self._asked = None
        self._stack.close()


def _broken(function: Callable[..., object], arguments: Sequence[object], cause: str) -> PairmillError:
    what = " of ".join([getattr(function, "__name__", str(function)), *(type(one).__name__ for one in arguments[:1])])
    return PairmillError(
        expected=f"a process that survives one in {DEATHS} calls ({what})",
        found=f"{cause} at every one",
        remedy="mend the filter, its settings or its libraries, then run the same command again",
    )


def _cause(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:  # it lives, and only its pipe is closed
        process.kill()
        code = process.wait()
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, out of memory?" if name == "SIGKILL" else name


def _serve(connection: Connection) -> None:
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel takes this process first
    with contextlib.suppress(ConnectionError):  # nobody listens any more
        connection.send_bytes(b"ready")
        while True:
            connection.send_bytes(call(_answer, connection))


def _answer(connection: Connection) -> Any:
    function, arguments, named = connection.recv()  # what can't be loaded here is told like what the function raises
    return function(*arguments, **named)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
