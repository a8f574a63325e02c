"""The orchestration server that a run reports to: the team's (`PREFECT_API_URL`), or a dedicated local one.

The local one keeps its SQLite database in the workspace (`prefect/`), listens on loopback, starts in some seconds and
ends with the run. Prefect's ephemeral server isn't used: it loses task-run records at exit.
"""

import contextlib
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from pairs.errors import PairmillError
from pairs.process import child

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours, the server keeps the log
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
START_S = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def orchestration(home: Path, port: int | None = None, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """The API's address while the block lasts; also set in this process's environment, for Prefect to read.
    Call it before Prefect is imported; `meanwhile` is called while the server starts, and may import it."""
    os.environ.update(QUIET)
    if url := os.environ.get("PREFECT_API_URL"):
        meanwhile()
        yield url
        return
    home.mkdir(parents=True, exist_ok=True)
    port = _unused(port) if port else free_port()
    url = f"http://127.0.0.1:{port}/api"
    ours = {
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_API_URL": url,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home.resolve()}/prefect.db",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("ab") as log,
        child(command, environment=QUIET | ours, stdout=log, stderr=log) as process,
    ):
        os.environ.update(ours)
        try:
            meanwhile()
            _wait(url, process.poll, home / "server.log")
            yield url
        finally:
            _flush()
            for name in ours:
                os.environ.pop(name, None)


def _unused(port: int) -> int:
    """The port, if nobody answers there: another server's answers would pass for ours."""
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise PairmillError(
                expected=f"port {port} to be free on 127.0.0.1",
                found="another server that answers there",
                remedy="choose another --port, or end that server",
            )
    return port


def _flush() -> None:
    """Sends the log lines that still wait, before their server ends."""
    if handlers := sys.modules.get("prefect.logging.handlers"):
        handlers.APILogWorker.drain_all(timeout=5)


def _wait(url: str, ended: Callable[[], int | None], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            if answer.status == 200 and ended() is None:  # an answer without a process of ours is someone else's
                return
        if ended() is not None:
            break
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-400:] if log.exists() else ""
    raise PairmillError(
        expected=f"Prefect's server at {url} within {START_S:.0f} s",
        found=" ".join(tail.split()) or "no answer",
        remedy=f"read {log}, or name a running server with PREFECT_API_URL",
    )
