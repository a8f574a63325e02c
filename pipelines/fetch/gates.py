"""What stops a fetch early, with the probable cause: a preflight, the first batch, a success rate that collapses.

Preflight: three images drawn here go from a server on loopback through a client and the decoders like those that
follow, before the first shard. First batch: after `FIRST` candidates that nobody refused the source's success rate,
earlier increments included, must reach `gates.min_fetch_success`. Collapse: of hosts that gave images, the last `FIRST`
candidates fall below a fifth of what they gave before (dead hosts, whose answers come last, don't count); looked at
every `EVERY` of them. A floor of 0 turns the first batch off alone. What is published stays, and the same command goes
on.
"""

import asyncio
import io
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from aiohttp import web

from pairs.errors import PairmillError
from pipelines.fetch.client import Limits, any_headers, any_url, open_client
from pipelines.fetch.failures import Failure
from pipelines.fetch.guard import networks
from pipelines.fetch.pool import Decode

FIRST, EVERY = 200, 50
COLLAPSED = 0.2  # of the success rate before
PROBED = {"jpeg": {"quality": 90}, "png": {}, "webp": {"quality": 90}}
SIZE = (96, 64)
CAUSES = {  # by the beginning of the most frequent reason
    "transient/dns": "name resolution fails: is there a network, and does its resolver bear this rate?",
    "transient/connect": "connections fail: is there a network, or does a firewall refuse them?",
    "transient/deadline": "answers are too slow: is the line full? Lower fetch.connections or raise fetch.deadline_s",
    "transient/http_429": "the sites ask for fewer requests: raise fetch.delay_s, lower fetch.per_host",
    "transient/http_5": "the servers fail: wait for them, lower fetch.per_host",
    "transient/host_": "a host is down or wants a rest: wait for it",
    "permanent/http_40": "the sites refuse or no longer have these images: is the list old, is the agent blocked?",
    "permanent/decode": "decoding fails: is there enough memory?",
    "permanent/memory": "decoding fails: is there enough memory?",
    "permanent/html": "pages come instead of images: a login or a captcha?",
    "refused": "what is asked for is refused: see docs/operations.md, The network",
}


def _image(kind: str) -> bytes:
    from PIL import Image

    ramp = np.linspace(0, 255, SIZE[0], dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (SIZE[1], 1))] * 3, axis=2)
    pixels[: SIZE[1] // 2, :, 0] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **PROBED[kind])
    return out.getvalue()


async def preflight(agent: str, decode: Decode) -> str:
    """Sends the images through; returns the line to tell. Raises PairmillError with the cause."""
    began, images = time.monotonic(), {kind: _image(kind) for kind in PROBED}

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=images[request.path.strip("/")])

    app = web.Application()
    app.router.add_get("/{kind}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    client = open_client(agent, 1, 1, networks(["127.0.0.1/32"], "preflight"))
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        for kind in PROBED:
            answered = await client.fetch(f"http://127.0.0.1:{port}/{kind}", Limits(attempts=1), any_url, any_headers)
            found = answered.result
            decoded = found if isinstance(found, Failure) else await decode(found.body)
            if isinstance(decoded, Failure):
                raise _failed(kind, decoded)
    finally:
        await client.session.close()
        await runner.cleanup()
    return f"preflight: {len(PROBED)} of {len(PROBED)} images came through in {time.monotonic() - began:.1f} s"


def _failed(kind: str, failure: Failure) -> PairmillError:
    name = f"{failure.status}/{failure.reason}"
    return PairmillError(
        expected=f"a {kind} drawn here to come through the client and the decoders (preflight)",
        found=name,
        remedy=f"{_cause(name)}; nothing of the source was asked for",
    )


@dataclass
class SuccessGate:
    """Judges each outcome ("ok" or "status/reason") as it comes, refusals left out. `before` are those of earlier
    increments."""

    source: str
    floor: float
    before: Counter[str] = field(default_factory=Counter)
    now: Counter[str] = field(default_factory=Counter)
    good: set[str] = field(default_factory=set)  # hosts that gave an image
    since: Counter[str] = field(default_factory=Counter)  # outcomes of these hosts
    last: deque[str] = field(default_factory=lambda: deque(maxlen=FIRST))  # the latest of them

    def judge(self, outcome: str, host: str) -> None:
        """Raises PairmillError where the fetch had better stop."""
        if outcome.startswith("refused/"):
            return
        self.now[outcome] += 1
        if outcome == "ok":
            self.good.add(host)
        if self.floor and self.now.total() == FIRST and _success(every := self.before + self.now) < self.floor:
            wanted = f"at least {self.floor:.0%} of the first {FIRST} candidates"
            raise self._stop(wanted, every, self.now, "gates.min_fetch_success")
        if host not in self.good:
            return
        self.since[outcome] += 1
        self.last.append(outcome)
        if len(self.last) < FIRST or self.since.total() % EVERY:
            return
        window = Counter(self.last)
        earlier = self.since - window
        if earlier["ok"] and _success(window) < COLLAPSED * _success(earlier):
            wanted = f"at least {COLLAPSED:.0%} of the success rate so far ({_success(earlier):.0%})"
            raise self._stop(wanted, window, window)

    def _stop(self, expected: str, counts: Counter[str], window: Counter[str], setting: str = "") -> PairmillError:
        failures = Counter({name: count for name, count in window.items() if name != "ok"}).most_common(3)
        told = ", ".join(f"{count} × {name}" for name, count in failures)
        return PairmillError(
            expected=f"{expected} of the source {self.source!r}" + (setting and f" ({setting})"),
            found=f"{_success(counts):.1%}; of the last {window.total()}: {told}",
            remedy=f"{_cause(failures[0][0])}; then run the same command again" + (setting and f", or lower {setting}"),
        )


def _success(counts: Counter[str]) -> float:
    """The share of ok among what nobody refused; 0 where that is nothing."""
    asked = sum(count for name, count in counts.items() if not name.startswith("refused/"))
    return counts["ok"] / asked if asked else 0.0


def _cause(name: str) -> str:
    return next((cause for start, cause in CAUSES.items() if name.startswith(start)), f"look for what gives {name}")


@dataclass
class Watch:
    """Of one shard: when one of its rows last ended (`time.monotonic()`)."""

    moved: float = field(default_factory=time.monotonic)

    def touch(self) -> None:
        self.moved = time.monotonic()

    def stuck(self, rows: "list[asyncio.Task]", under_way: "dict[asyncio.Task | None, float]", stuck_s: float) -> bool:
        """Whether nothing has moved for `stuck_s`, and some row has had its host's turn for as long: rows that only
        wait for their turn at a slow host aren't stuck."""
        now = time.monotonic()
        held = (now - under_way.get(row, now) for row in rows if not row.done())
        return now - self.moved > stuck_s and any(seconds > stuck_s for seconds in held)
