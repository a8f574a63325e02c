"""Hostile URLs and servers, and what each costs whoever fetches from it: seconds, and memory of fetch and decoder.

A fetch runs in a process of its own, forked from a clean one that has imported all there is to import: its peak is
reset before (`/proc/<process>/clear_refs`), so that nothing an earlier case has held or freed hides what this one
holds.
"""

import asyncio
import gzip
import multiprocessing
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipelines.fetch.client import Limits, any_headers, any_url, open_client
from pipelines.fetch.decode import Decoded, DecodeSpec
from pipelines.fetch.failures import Failure
from pipelines.fetch.guard import networks
from pipelines.fetch.pool import decoders
from tests.pipelines.small_web import ALLOW, picture
from tests.pipelines.test_fetch import SPEC, png_bomb

AGENT = "pairmill/1 (+mailto:test@localhost)"
LIMITS = Limits(deadline_s=1.5, max_bytes=1_000_000, attempts=1)
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload([__name__])

URLS = {  # judged without a socket
    "file:///etc/passwd": "scheme", "data:image/png;base64,AAAA": "scheme", "ftp://a.test/a.png": "scheme",
    "javascript:alert(1)": "scheme", "gopher://127.0.0.1:70/": "scheme", "dict://127.0.0.1/": "scheme",
    "http://user:pw@a.test/": "credentials", "http://127.0.0.1@a.test/": "credentials",
    "http://2130706433/": "numeric_host", "http://017700000001/": "numeric_host", "http://0x7f.1/": "numeric_host",
    "http://0x7f000001/": "numeric_host", "http://127.1/": "numeric_host", "http://127.0.0.1./": "numeric_host",
    "http://10.0.0.1/": "address", "http://169.254.169.254/latest/": "address", "http://0.0.0.0/": "address",
    "http://[::1]/": "address", "http://[::ffff:7f00:1]/": "address", "http://[::ffff:169.254.169.254]/": "address",
    "http://[64:ff9b::a9fe:a9fe]/": "address", "http://[64:ff9b:1::a00:1]/": "address",
    "http://[2002:7f00:1::]/": "address",
    "http://[2001:0:7f00:1::]/": "address", "http://[fec0::1]/": "address", "http://[fe80::1%25lo]/": "address",
    "http://[fd00:ec2::254]/": "address", "http://[::7f00:1]/": "address", "http://8.8.8.8:22/": "port",
    "http://inside.test/": "address", "http://①②⑦.0.0.1/": "address", "http://127。0。0。1/": "address",
    "http:///a.png": "bad_url", "http://[::1/": "bad_url", "http://a.test:99999/": "bad_url",
}  # fmt: skip


Talk = Callable[[socket.socket], None]


@contextmanager
def raw_server(talk: Talk, host: str = "127.0.0.1") -> Iterator[tuple[int, list[bytes]]]:
    """Hands each connection to `talk` after its request has been read; yields the port and the requests."""
    listener, asked = socket.create_server((host, 0)), []

    def one(connection: socket.socket) -> None:
        with connection:
            try:
                asked.append(connection.recv(65536))
                talk(connection)
            except OSError:
                pass  # the client has gone, as it should

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def sends(*parts: bytes, pause_s: float = 0.0, again: bytes = b"", times: int = 10**9) -> Talk:
    def talk(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        for _ in range(times if again else 0):
            connection.sendall(again)
            time.sleep(pause_s)

    return talk


def says(*parts: bytes, pause_s: float = 0.0, again: bytes = b"") -> Callable[[], Talk]:
    return lambda: sends(*parts, pause_s=pause_s, again=again)


def resets(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def body(data: bytes, *headers: bytes) -> bytes:
    head = b"".join(b"\r\n" + header for header in headers)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d%s\r\n\r\n" % (len(data), head) + data


def redirect(target: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n"


OK, MEGABYTE = b"HTTP/1.1 200 OK\r\n", bytes(1 << 20)
NEVER = "Fri, 31 Dec 9999 23:59:59 -1200"  # later than any datetime of UTC
LOOP, CHUNKED = redirect(b"/again"), b"Transfer-Encoding: chunked\r\n\r\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>fetch('http://10.0.0.1')</script></svg>"
POLYGLOT = b"GIF89a/*" + b"\0" * 20 + b"*/=1;<html><script>alert(1)</script>"
SERVERS: dict[str, tuple[Callable[[], Talk], set[str]]] = {  # what a server does, and the reasons that may come of it
    "drip": (says(OK + b"Content-Length: 99999\r\n\r\n", pause_s=0.1, again=b"x"), {"deadline"}),
    "endless body": (says(OK + b"\r\n", again=MEGABYTE), {"too_large"}),
    "endless chunks": (says(OK + CHUNKED, again=b"10000\r\n" + bytes(65536) + b"\r\n"), {"too_large"}),
    "huge content-length": (says(OK + b"Content-Length: 999999999999\r\n\r\n", again=MEGABYTE), {"too_large"}),
    "overflowing content-length": (says(OK + b"Content-Length: " + b"9" * 60 + b"\r\n\r\nx"),
                                   {"too_large", "bad_response", "cut_body", "connection"}),
    "negative content-length": (says(OK + b"Content-Length: -5\r\n\r\nx"), {"bad_response"}),
    "two content-lengths": (says(OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nxxxxx"),
                            {"bad_response", "cut_body", "not_an_image"}),
    "chunked garbage": (says(OK + CHUNKED + b"ZZZ\r\nnonsense"), {"cut_body", "bad_response"}),
    "slow headers": (says(OK, pause_s=0.1, again=b"X: y\r\n"), {"deadline"}),
    "header flood": (says(OK, again=b"X-Flood: " + b"y" * 4000 + b"\r\n"),
                     {"bad_response", "deadline", "connection", "disconnected"}),
    "one endless header": (says(OK + b"X: ", again=b"y" * 65536), {"bad_response"}),
    "endless status line": (says(b"HTTP/1.1 200 ", again=b"y" * 65536), {"bad_response"}),
    "http/0.9": (says(b"<html>no headers at all</html>"), {"bad_response", "disconnected"}),
    "binary garbage": (says(bytes(range(256)) * 64), {"bad_response", "disconnected"}),
    "silence": (says(again=b"", pause_s=0.1), {"disconnected"}),
    "reset in the body": (lambda: resets, {"connection", "cut_body", "disconnected"}),
    "truncated body": (says(OK + b"Content-Length: 5000\r\n\r\nabc"), {"cut_body"}),
    "endless 100-continue": (says(again=b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.01),
                             {"deadline", "bad_response", "disconnected"}),
    "a rest beyond all time": (says(b"HTTP/1.1 503 X\r\nRetry-After: " + NEVER.encode() + b"\r\n\r\n"), {"http_503"}),
    "redirect loop": (says(LOOP), {"too_many_redirects"}),
    "redirect to metadata": (says(redirect(b"http://169.254.169.254/latest/meta-data/")), {"address"}),
    "redirect to a file": (says(redirect(b"file:///etc/passwd")), {"scheme"}),
    "redirect to a mapped address": (says(redirect(b"http://[::ffff:10.0.0.1]/")), {"address"}),
    "redirect with credentials": (says(redirect(b"http://a:b@127.0.0.1/")), {"credentials"}),
    "redirect to no address": (says(redirect(b"http://[bad")), {"bad_url"}),
    "gzip bomb": (lambda: sends(body(gzip.compress(bytes(200 << 20)), b"Content-Encoding: gzip")), {"too_large"}),
    "gzip twice": (lambda: sends(body(gzip.compress(gzip.compress(bytes(50 << 20))), b"Content-Encoding: gzip, gzip")),
                   {"bad_response", "too_large", "not_an_image", "cut_body"}),
    "not gzip": (says(body(b"plain words", b"Content-Encoding: gzip")), {"bad_response", "cut_body"}),
    "30000×30000 PNG": (lambda: sends(body(png_bomb())), {"too_many_pixels"}),
    "SVG with script": (says(body(SVG, b"Content-Type: image/png")), {"svg"}),
    "polyglot": (says(body(POLYGLOT)), {"damaged", "not_an_image", "too_small"}),
    "page as image": (says(body(b"<!doctype html><p>", b"Content-Type: image/jpeg")), {"html"}),
    "truncated image": (says(body(picture("red", (500, 500), "JPEG")[:700])), {"damaged"}),
    "PNG with a zip bomb of text": (lambda: sends(body(picture()[:33] + b"".join(
        struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
        for data in [b"k\0\0" + zlib.compress(bytes(150 << 20))]) + picture()[33:])), {"damaged"}),
}  # fmt: skip


class Cost(NamedTuple):
    """`outcome` is "ok" or the reason. Memory is growth up to the peak, in bytes; None where no decoder was needed."""

    outcome: str
    seconds: float
    fetch_bytes: int
    decoder_bytes: int | None


def cost(port: int, max_bytes: int = LIMITS.max_bytes, max_pixels: int = SPEC.max_pixels) -> Cost:
    """Fetches an image of the server at `port` of loopback and decodes it."""
    with CLEAN.Pool(1) as pool:
        return pool.apply(_fetched, (f"http://127.0.0.1:{port}/a.png", max_bytes, max_pixels))


def _fetched(url: str, max_bytes: int, max_pixels: int) -> Cost:
    return asyncio.run(_fetch(url, replace(LIMITS, max_bytes=max_bytes), replace(SPEC, max_pixels=max_pixels)))


async def _fetch(url: str, limits: Limits, spec: DecodeSpec) -> Cost:
    fetch, began = _Peak(os.getpid()), time.monotonic()
    client = open_client(AGENT, 4, 16, networks(ALLOW, "test"))
    async with client.session:
        result = (await client.fetch(url, limits, any_url, any_headers)).result
    seconds = time.monotonic() - began
    if isinstance(result, Failure):
        return Cost(result.reason, seconds, fetch.grown(), None)
    async with decoders(spec, 1) as decode:
        assert isinstance(await decode(picture()), Decoded), "it is warm"
        decoder, began = _Peak(_children()[0]), time.monotonic()
        found = await decode(result.body)
        outcome = found.reason if isinstance(found, Failure) else "ok"
        return Cost(outcome, seconds + time.monotonic() - began, fetch.grown(), decoder.grown())


class _Peak:
    """How far a process's resident memory grows from here on."""

    def __init__(self, process: int) -> None:
        self._folder = Path(f"/proc/{process}")
        (self._folder / "clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def grown(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        line = next(line for line in (self._folder / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def _children() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
