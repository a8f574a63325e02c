"""A server of a few routes on a loopback address, in a thread, that remembers what it was asked for."""

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from PIL import Image

Route = Callable[[web.Request], Awaitable[web.StreamResponse]]
ALLOW = ["127.0.0.0/8"]


@dataclass
class SmallWeb:
    """`routes` by path; a value is a body, or a coroutine that answers."""

    routes: dict[str, bytes | str | Route]
    host: str = "127.0.0.1"
    port: int = 0
    asked: list[str] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://{self.host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        route = self.routes.get(request.path)
        if route is None:
            return web.Response(status=404)
        if callable(route):
            return await route(request)
        if isinstance(route, str):
            return web.Response(text=route, content_type="text/html")
        return web.Response(body=route, content_type="image/png")


@contextmanager
def small_web(routes: dict[str, bytes | str | Route], host: str = "127.0.0.1") -> Iterator[SmallWeb]:
    site = SmallWeb(routes, host)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", site.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        tcp = web.TCPSite(runner, host, 0)
        await tcp.start()
        site.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield site
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def redirect(target: str) -> Route:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": target})

    return answer


def with_headers(body: bytes, headers: dict[str, str], status: int = 200) -> Route:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=headers, status=status)

    return answer


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded plain image."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, kind)
    return out.getvalue()
