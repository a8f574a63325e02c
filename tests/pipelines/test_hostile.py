"""Hostile URLs and servers, each refused or bounded in time and memory, with its reason.

Nothing but loopback is contacted: names are resolved by a resolver of the test, and what lies elsewhere is refused
before a socket exists.
"""

import asyncio
import gzip
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipelines.fetch.client import Failure, Limits, Response, any_headers, any_url, open_client
from pipelines.fetch.decode import Decoded
from pipelines.fetch.guard import networks
from pipelines.fetch.pool import decoders
from tests.pipelines.small_web import ALLOW, picture
from tests.pipelines.test_fetch import SPEC, png_bomb
from tests.pipelines.test_guard import Changing

AGENT = "pairmill/1 (+mailto:test@localhost)"
LIMITS = Limits(deadline_s=1.5, max_bytes=1_000_000, attempts=1)
MEMORY = 80 << 20  # more than this a case may not add to the peak of this process

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


@pytest.mark.parametrize("url", URLS)
async def test_urls_that_lead_inside_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = open_client(AGENT, 4, 16, (), Changing(["10.0.0.7"]))

    def no_socket(*_: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr("pipelines.fetch.guard.socket.socket", no_socket)
    answer = await client.fetch(url, LIMITS, any_url, any_headers)
    await client.session.close()
    assert isinstance(answer.result, Failure) and answer.result.reason == URLS[url], answer
    assert answer.result.status in ("refused", "permanent")


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


def resets(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def body(data: bytes, *headers: bytes) -> bytes:
    head = b"".join(b"\r\n" + header for header in headers)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d%s\r\n\r\n" % (len(data), head) + data


def redirect(target: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n"


OK, MEGABYTE = b"HTTP/1.1 200 OK\r\n", bytes(1 << 20)
LOOP = redirect(b"/again")
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>fetch('http://10.0.0.1')</script></svg>"
POLYGLOT = b"GIF89a/*" + b"\0" * 20 + b"*/=1;<html><script>alert(1)</script>"
SERVERS: dict[str, tuple[Talk, set[str]]] = {  # what a server on loopback does, and the reasons that may come of it
    "drip": (sends(OK + b"Content-Length: 99999\r\n\r\n", pause_s=0.1, again=b"x"), {"deadline"}),
    "endless body": (sends(OK + b"\r\n", again=MEGABYTE), {"too_large"}),
    "endless chunks": (sends(OK + b"Transfer-Encoding: chunked\r\n\r\n", again=b"10000\r\n" + bytes(65536) + b"\r\n"),
                       {"too_large"}),
    "huge content-length": (sends(OK + b"Content-Length: 999999999999\r\n\r\n", again=MEGABYTE), {"too_large"}),
    "overflowing content-length": (sends(OK + b"Content-Length: " + b"9" * 60 + b"\r\n\r\nx"),
                                   {"too_large", "bad_response", "cut_body", "connection"}),
    "negative content-length": (sends(OK + b"Content-Length: -5\r\n\r\nx"), {"bad_response"}),
    "two content-lengths": (sends(OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nxxxxx"),
                            {"bad_response", "cut_body", "not_an_image"}),
    "chunked garbage": (sends(OK + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nnonsense"), {"cut_body", "bad_response"}),
    "slow headers": (sends(OK, pause_s=0.1, again=b"X: y\r\n"), {"deadline"}),
    "header flood": (sends(OK, again=b"X-Flood: " + b"y" * 4000 + b"\r\n"),
                     {"bad_response", "deadline", "connection", "disconnected"}),
    "one endless header": (sends(OK + b"X: ", again=b"y" * 65536), {"bad_response"}),
    "endless status line": (sends(b"HTTP/1.1 200 ", again=b"y" * 65536), {"bad_response"}),
    "http/0.9": (sends(b"<html>no headers at all</html>"), {"bad_response", "disconnected"}),
    "binary garbage": (sends(bytes(range(256)) * 64), {"bad_response", "disconnected"}),
    "silence": (sends(again=b"", pause_s=0.1), {"disconnected"}),
    "reset in the body": (resets, {"connection", "cut_body", "disconnected"}),
    "truncated body": (sends(OK + b"Content-Length: 5000\r\n\r\nabc"), {"cut_body"}),
    "endless 100-continue": (sends(again=b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.01),
                             {"deadline", "bad_response", "disconnected"}),
    "redirect loop": (sends(LOOP), {"too_many_redirects"}),
    "redirect to metadata": (sends(redirect(b"http://169.254.169.254/latest/meta-data/")), {"address"}),
    "redirect to a file": (sends(redirect(b"file:///etc/passwd")), {"scheme"}),
    "redirect to a mapped address": (sends(redirect(b"http://[::ffff:10.0.0.1]/")), {"address"}),
    "redirect with credentials": (sends(redirect(b"http://a:b@127.0.0.1/")), {"credentials"}),
    "redirect to no address": (sends(redirect(b"http://[bad")), {"bad_url"}),
    "gzip bomb": (sends(body(gzip.compress(bytes(200 << 20)), b"Content-Encoding: gzip")), {"too_large"}),
    "gzip twice": (sends(body(gzip.compress(gzip.compress(bytes(50 << 20))), b"Content-Encoding: gzip, gzip")),
                   {"bad_response", "too_large", "not_an_image", "cut_body"}),
    "not gzip": (sends(body(b"plain words", b"Content-Encoding: gzip")), {"bad_response", "cut_body"}),
    "30000×30000 PNG": (sends(body(png_bomb())), {"too_many_pixels"}),
    "SVG with script": (sends(body(SVG, b"Content-Type: image/png")), {"svg"}),
    "polyglot": (sends(body(POLYGLOT)), {"damaged", "not_an_image", "too_small"}),
    "page as image": (sends(body(b"<!doctype html><p>", b"Content-Type: image/jpeg")), {"html"}),
    "truncated image": (sends(body(picture("red", (500, 500), "JPEG")[:700])), {"damaged"}),
    "PNG with a zip bomb of text": (sends(body(picture()[:33] + b"".join(
        struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
        for data in [b"k\0\0" + zlib.compress(bytes(150 << 20))]) + picture()[33:])), {"damaged"}),
}  # fmt: skip


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def answer_of(port: int, host: str = "127.0.0.1") -> Failure | Decoded:
    client = open_client(AGENT, 4, 16, networks(ALLOW, "test"))
    try:
        answer = await client.fetch(f"http://{host}:{port}/a.png", LIMITS, any_url, any_headers)
    finally:
        await client.session.close()
    if not isinstance(answer.result, Response):
        return answer.result
    async with decoders(SPEC, 1) as decode:
        return await decode(answer.result.body)


@pytest.mark.parametrize("name", SERVERS)
def test_a_hostile_server_is_refused_or_bounded(name: str) -> None:
    talk, reasons = SERVERS[name]
    before, began = peak_bytes(), time.monotonic()
    with raw_server(talk) as (port, asked):
        found = asyncio.run(answer_of(port))
        assert asked, "the case reaches its socket"
        assert len(asked) <= 6
    assert isinstance(found, Failure) and found.reason in reasons, found
    assert time.monotonic() - began < 30, "the deadline of a request is 1.5 s; the rest is the start of a decoder"
    assert peak_bytes() - before < MEMORY


async def test_a_name_that_changes_between_two_requests_is_checked_each_time() -> None:
    """First the name is this server's address, then one of a local network: no socket is made for that."""
    with raw_server(sends(body(picture(), b"Connection: close"))) as (port, asked):
        resolver = Changing(["127.0.0.1"], ["192.168.0.1"])
        client = open_client(AGENT, 4, 16, networks(ALLOW, "test"), resolver)
        client.session.connector._use_dns_cache = False  # type: ignore[union-attr]
        first, second = [
            (await client.fetch(f"http://a.test:{port}/", LIMITS, any_url, any_headers)).result for _ in range(2)
        ]
        await client.session.close()
    assert isinstance(first, Response) and second == Failure("refused", "address") and len(asked) == 1
