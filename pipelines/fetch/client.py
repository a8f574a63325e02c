"""One guarded HTTP client for the crawler, robots.txt and the images: bounded in time, bytes and redirects.

`Client.hop` is one request; `Client.fetch` follows redirects and retries. Every hop waits for its host's turn and pace
(waiting isn't counted), asks robots.txt, and draws on one budget of seconds per URL, so that a server that drips can't
hold a connection longer. What goes wrong is a `Failure` with a class and a stable reason, never an exception.
"""

import asyncio
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pairs.errors import PairmillError
from pipelines.fetch.failures import Failure, Headers, bad_status, classify, pause
from pipelines.fetch.guard import Network, guarded_connector, refuse_url

BUFFER_BYTES = 1 << 18  # of a body, before its connection is read no further: most images come in one piece
CONNECT_S = 10.0
HELD_BYTES = 256 << 20
DEAD_AFTER = 8  # connections in a row that a host which never answered may refuse, before it is left alone
REDIRECTS = frozenset({301, 302, 303, 307, 308})
CONDITIONS = frozenset({"If-None-Match", "If-Modified-Since"})
PLAIN = re.compile(r"[!-~]*")
CLIMBS = re.compile(r"(?:^|/|%2f|\\|%5c)(?:\.|%2e){1,2}(?:/|%2f|\\|%5c|$)", re.IGNORECASE)
CONNECTING = frozenset({"connect", "connect_timeout", "dns"})
RESTING = frozenset({429, 503})  # with Retry-After, these speak for the whole host
CONTACT = re.compile(r"[^\s@]+@[^\s@]+|https?://[^\s/]+")
ANY: Mapping[str, str] = {"Accept": "*/*"}

Judge = Callable[[Headers], "Failure | None"]


class Response(NamedTuple):
    """What was fetched; `status` is 0 for a local file."""

    url: str
    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Limits:
    """What one URL may cost. `deadline_s` covers its redirects, bodies, retries and back-off together."""

    deadline_s: float = 30.0
    max_bytes: int = 20_000_000
    redirects: int | None = 5  # None hands a redirect to the caller
    attempts: int = 3
    cut: bool = False  # a longer body is cut instead of refused (robots.txt)


@dataclass
class Host:
    """What is known of a host: its turnstile, its pace, until when it wants no request, and whether it ever answered.
    Times are `time.monotonic()`."""

    turn: asyncio.Semaphore
    delay_s: float = 0.0
    next_at: float = 0.0
    rests_until: float = 0.0
    answered: bool = False
    unreachable: int = 0

    async def pace(self) -> None:
        """Waits until `delay_s` have passed since the host's last request began."""
        now = time.monotonic()
        at = max(now, self.next_at)
        self.next_at = at + self.delay_s
        if at > now:
            await asyncio.sleep(at - now)

    def rest(self, failure: "Failure") -> None:
        """Takes note of a Retry-After."""
        if failure.http_status in RESTING and failure.retry_after_s:
            self.rests_until = max(self.rests_until, time.monotonic() + failure.retry_after_s)


class Answer(NamedTuple):
    """The outcome for one URL, and the attempts it took."""

    result: Response | Failure
    attempts: int


Permit = Callable[[URL], Awaitable["Failure | None"]]


@dataclass
class Client:
    """A session with per-host turns. Use it inside `async with open_client(...)`."""

    session: aiohttp.ClientSession
    agent: str
    per_host: int
    slots: asyncio.Semaphore
    delay_s: float = 0.0  # between the starts of two requests to a host; a Crawl-delay may lengthen it
    hosts: dict[str, Host] = field(default_factory=dict)
    requests: int = 0
    held_bytes: int = 0  # of bodies that wait for a decoder
    under_way: "dict[asyncio.Task[object] | None, float]" = field(default_factory=dict)  # since when it has its turn
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    def host(self, url: URL) -> Host:
        name = url.host or ""
        if name not in self.hosts:
            self.hosts[name] = Host(asyncio.Semaphore(self.per_host), self.delay_s)
        return self.hosts[name]

    def rests(self) -> dict[str, float]:
        """Until when hosts want no request, in seconds since 1970."""
        now, since = time.monotonic(), time.time() - time.monotonic()
        return {name: since + host.rests_until for name, host in self.hosts.items() if name and host.rests_until > now}

    def rest(self, until: Mapping[str, float]) -> None:
        """Leaves hosts alone as `rests` of another client said."""
        for host, at in until.items():
            self.host(URL.build(host=host)).rests_until = time.monotonic() + at - time.time()

    def hold(self, size_bytes: int) -> None:
        """Counts a body that waits for a decoder, or with a negative size one that no longer does."""
        self.held_bytes += size_bytes
        self._room.set()

    async def room(self) -> None:
        """Waits until the bodies in memory are few enough for another."""
        while self.held_bytes > HELD_BYTES:
            self._room.clear()
            await self._room.wait()

    async def fetch(
        self, url: str, limits: Limits, permit: Permit, judge: Judge, ask: Mapping[str, str] = ANY
    ) -> Answer:
        """The body behind `url` after redirects, or why there is none. `permit` is asked before each hop
        (robots.txt), `judge` sees the headers before the body is read, `ask` are request headers: with If-None-Match or
        If-Modified-Since an answer of 304 is a Response too."""
        budget = Budget(limits.deadline_s)
        attempts = 0
        while True:
            attempts += 1
            result = await self._follow(url, limits, budget, permit, judge, ask)
            if not isinstance(result, Failure) or result.status != "transient" or attempts >= limits.attempts:
                return Answer(result, attempts)
            wait_s = pause(result, url, attempts)
            if wait_s >= budget.left_s:
                return Answer(result, attempts)
            budget.left_s -= wait_s
            await asyncio.sleep(wait_s)

    async def _follow(
        self, start: str, limits: Limits, budget: "Budget", permit: Permit, judge: Judge, ask: Mapping[str, str]
    ) -> Response | Failure:
        here = start
        for _ in range((limits.redirects or 0) + 1):
            try:
                url = URL(here)
                refusal = refuse_url(url)
            except ValueError:
                return Failure("permanent", "bad_url")
            failure = Failure("refused", refusal) if refusal else await permit(url)
            result = failure or await self.hop(_verbatim(here, url), limits, budget, judge, ask)
            if isinstance(result, Failure) or result.status not in REDIRECTS or limits.redirects is None:
                return result
            location = result.headers.get("Location")
            if not location:
                return Failure("permanent", "redirect_without_location", result.status)
            try:
                here = urljoin(here, location)
            except ValueError:
                return Failure("permanent", "bad_url", result.status)
        return Failure("permanent", "too_many_redirects")

    async def hop(
        self, url: URL, limits: Limits, budget: "Budget", judge: Judge, ask: Mapping[str, str] = ANY
    ) -> Response | Failure:
        """One request without redirects, when its host and the machine have a free turn."""
        if lacks_contact(self.agent, url.host or ""):  # a redirect: the addresses of a source are checked beforehand
            return Failure("transient", "no_contact")
        host, task = self.host(url), asyncio.current_task()
        self.under_way.pop(task, None)
        async with host.turn:
            if (rest := host.rests_until - time.monotonic()) > budget.left_s:
                return Failure("transient", "host_rests", retry_after_s=rest)
            if rest > 0:
                await asyncio.sleep(rest)
            await host.pace()
            async with self.slots:
                self.under_way[task] = time.monotonic()
                await self.room()
                if not host.answered and host.unreachable >= DEAD_AFTER:
                    return Failure("transient", "host_unreachable")
                began = time.monotonic()
                try:
                    async with asyncio.timeout(budget.left_s):
                        result = await self._request(url, limits, judge, ask)
                except Exception as error:
                    result = classify(error)
                budget.left_s -= time.monotonic() - began
                connected = isinstance(result, Response) or result.reason not in CONNECTING
                host.answered |= connected
                host.unreachable += not connected
                if isinstance(result, Failure):
                    host.rest(result)
                return result

    async def _request(self, url: URL, limits: Limits, judge: Judge, ask: Mapping[str, str]) -> Response | Failure:
        headers = {"User-Agent": self.agent, **ask}
        self.requests += 1
        async with self.session.get(url, headers=headers, allow_redirects=False) as answer:
            if answer.status in REDIRECTS or (answer.status == 304 and not CONDITIONS.isdisjoint(ask)):
                return Response(str(url), answer.status, answer.headers, b"")
            if failure := bad_status(answer) or judge(answer.headers):
                answer.close()
                return failure._replace(http_status=answer.status)
            if (answer.content_length or 0) > limits.max_bytes and not limits.cut:
                answer.close()
                return Failure("permanent", "too_large", answer.status)
            chunks, size = list[bytes](), 0
            async for chunk in answer.content.iter_any():  # decompressed already
                chunks.append(chunk)
                size += len(chunk)
                if size > limits.max_bytes:
                    answer.close()
                    if not limits.cut:
                        return Failure("permanent", "too_large", answer.status)
                    break
            return Response(str(url), answer.status, answer.headers, b"".join(chunks)[: limits.max_bytes])


@dataclass
class Budget:
    """Seconds that a URL may still spend."""

    left_s: float


def open_client(
    agent: str,
    per_host: int,
    connections: int,
    allow: tuple[Network, ...],
    resolver: AbstractResolver | None = None,
    delay_s: float = 0.0,
) -> Client:
    """A client behind the egress guard; the caller closes `client.session`. Call it inside a running loop."""
    session = aiohttp.ClientSession(
        connector=guarded_connector(allow, 0, resolver),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        read_bufsize=BUFFER_BYTES,
        trust_env=False,
    )
    return Client(session, agent, per_host, asyncio.Semaphore(connections), delay_s)


def require_contact(agent: str, hosts: Iterable[str]) -> None:
    """Refuses an agent string without a contact for any host that isn't loopback: a site must be able to complain."""
    for host in () if CONTACT.search(agent) else hosts:
        if lacks_contact(agent, host):
            raise PairmillError(
                expected=f"a contact in fetch.agent, for requests to {host}",
                found=repr(agent),
                remedy="name an address that you read, such as fetch: {agent: 'pairmill (+mailto:me@my-domain)'}",
            )


@lru_cache(maxsize=4096)
def lacks_contact(agent: str, host: str) -> bool:
    """Whether `host` must be told a contact, and isn't."""
    if CONTACT.search(agent):
        return False
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".") != "localhost"


def _verbatim(address: str, url: URL) -> URL:
    """`url` with path and query byte for byte as in `address`, since a signature may cover them; where that is no plain
    text, or leads up a folder, as yarl normalises it."""
    if str(url) == address and "#" not in address:  # nothing was normalised
        return url
    parts = urlsplit(address)
    raw = parts.path + parts.query
    if not PLAIN.fullmatch(raw) or CLIMBS.search(parts.path):
        return url
    authority = url.raw_authority
    return URL.build(
        scheme=url.scheme, authority=authority, path=parts.path or "/", query_string=parts.query, encoded=True
    )


def any_headers(headers: Headers) -> Failure | None:
    """A judge that takes everything."""
    return None


async def any_url(url: URL) -> Failure | None:
    """A permit for every URL."""
    return None
