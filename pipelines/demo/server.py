"""The server of a demo web: all hosts in one process, told apart by the loopback address they were reached on.

Only what lies below `DIR/www/<host>/` is served; `DIR/routes.json` adds what a file can't do. Every request becomes
a JSON line in `DIR/truth/access.jsonl`, written before the answer is sent: who has an answer is in the log.

    python -m pipelines.demo.server DIR [--port P]
"""

import argparse
import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from aiohttp import web

from pairs.errors import PairmillError
from pairs.process import ROOT, child

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
START_S = 30.0


@dataclass(frozen=True)
class Site:
    """An open demo web. `routes` by "<host><path>", `delays_s` by host."""

    www: Path
    port: int
    routes: dict[str, dict[str, Any]]
    delays_s: dict[str, float]
    log: TextIO = field(compare=False)

    @property
    def hosts(self) -> list[str]:
        return sorted(folder.name for folder in self.www.iterdir())


def open_site(directory: Path, port: int = 0) -> Site:
    """Reads the routes and opens the log. Port 0 stands for the one in the pages' links."""
    routes = directory / "routes.json"
    if not routes.exists():
        raise PairmillError(
            expected="a directory made by `pairmill demo-web`",
            found=f"no routes.json in {directory}",
            remedy="make the web first, or name its directory",
        )
    record = json.loads(routes.read_text())
    log = (directory / "truth" / "access.jsonl").open("a", encoding="utf-8")
    return Site((directory / "www").resolve(), port or record["port"], record["routes"], record["delay_s"], log)


def find_file(site: Site, host: str, path: str) -> Path | None:
    """The file behind a path of a host, None if there is none or it lies elsewhere."""
    root = site.www / host
    if "\0" in path:
        return None
    try:
        target = (root / path.lstrip("/")).resolve()
        target = target / "index.html" if target.is_dir() else target
        return target if target.is_relative_to(root) and target.is_file() else None
    except OSError:  # a name too long for the file system is no file
        return None


async def answer(site: Site, request: web.Request) -> web.StreamResponse:
    """One request: the log's line, the host's delay, then what the route or the file says."""
    assert request.transport is not None
    host = request.transport.get_extra_info("sockname")[0]
    route = site.routes.get(f"{host}{request.path}", {})
    found = None if "location" in route else find_file(site, host, request.path)
    allowed = request.method in ("GET", "HEAD")
    status = route.get("status", 200 if found else 404) if allowed else 405
    _log(site, request, host, status)
    await asyncio.sleep(site.delays_s.get(host, 0.0))
    headers = dict(route.get("headers", {}))
    if "location" in route:
        return web.Response(status=status, headers=headers | {"Location": route["location"]})
    if found is None or status != 200:
        return web.Response(status=status, text="<!doctype html><title>Not here</title>", content_type="text/html")
    headers["Content-Type"] = TYPES[found.suffix]
    body = found.read_bytes()
    if "drip_s" in route and request.method == "GET":
        return await _drip(request, body, headers, route["drip_s"])
    return web.Response(body=body, headers=headers)


async def _drip(request: web.Request, body: bytes, headers: dict[str, str], pause_s: float) -> web.StreamResponse:
    """The body, a byte at a time, until it ends or the client has had enough."""
    response = web.StreamResponse(headers=headers | {"Content-Length": str(len(body))})
    await response.prepare(request)
    try:
        for byte in body:
            await response.write(bytes([byte]))
            await asyncio.sleep(pause_s)
        await response.write_eof()
    except ConnectionResetError:
        pass
    return response


def _log(site: Site, request: web.Request, host: str, status: int) -> None:
    line = {"time": time.time(), "host": host, "method": request.method, "path": request.path_qs, "status": status}
    site.log.write(json.dumps(line | {"agent": request.headers.get("User-Agent", "")}) + "\n")
    site.log.flush()


async def _run(site: Site) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await answer(site, request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        for host in site.hosts:
            await web.TCPSite(runner, host, site.port).start()
        print(f"{len(site.hosts)} hosts, start at http://{site.hosts[0]}:{site.port}/", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def serve(directory: Path, port: int = 0) -> None:
    """Serves the web until SIGINT or SIGTERM; prints one line once it answers. Port 0: the one its links name."""
    site = open_site(directory, port)
    try:
        asyncio.run(_run(site))
    except OSError as error:
        raise PairmillError(
            expected=f"port {site.port} free on {site.hosts[0]} to {site.hosts[-1]}",
            found=str(error),
            remedy="end the other server, or make the web for another port",
        ) from error
    finally:
        site.log.close()


@contextmanager
def running_server(directory: Path, port: int = 0) -> Iterator[str]:
    """The server in a child process, ended by its id; yields the URL of the first page.

    The child also ends when the thread that started it does (Linux), so a killed run leaves none behind.
    """
    command = [sys.executable, "-m", "pipelines.demo.server", str(directory.resolve()), "--port", str(port)]
    errors = directory / "truth" / "server.log"
    with (
        errors.open("wb") if errors.parent.is_dir() else open(os.devnull, "wb") as log,
        child(command, stdout=subprocess.PIPE, stderr=log, folder=ROOT, patience_s=5.0) as process,
    ):
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline().decode() if ready else ""
        if "http://" not in line:
            raise PairmillError(
                expected=f"a server for {directory} within {START_S:.0f} s",
                found=errors.read_text()[-500:].strip() if errors.exists() else "no such demo web",
                remedy="mend what it says; `pairmill demo-web` makes a web",
            )
        yield line.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a demo web on loopback.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0: the port its links name")
    arguments = parser.parse_args()
    try:
        serve(arguments.directory, arguments.port)
    except PairmillError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
