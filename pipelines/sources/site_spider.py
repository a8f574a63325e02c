"""The crawl's own process: `python -m pipelines.sources.site_spider CONFIG.json`.

Scrapy schedules, throttles per host and parses; every request goes through our guarded client, which also asks
robots.txt, retries and bounds. Scrapy's middlewares and extensions are off: redirects are followed by the walk
itself, as links that cost no depth, so that each hop is judged anew. A level is walked to its end before the next.
A page that an earlier crawl read is asked for conditionally (`site_cache.py`).
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scrapy import Request, Spider
from scrapy.crawler import AsyncCrawlerProcess, Crawler
from scrapy.http import HtmlResponse, Response
from scrapy.linkextractors import IGNORED_EXTENSIONS
from twisted.python.failure import Failure as TwistedFailure
from yarl import URL

from pairs.identity import canonical_url
from pairs.store import FULL
from pairs.workspace import Workspace
from pipelines.fetch.blocklists import Blocklists
from pipelines.fetch.client import REDIRECTS, Client, Limits, any_headers, open_client
from pipelines.fetch.failures import Failure, Headers
from pipelines.fetch.guard import networks, refuse_url
from pipelines.fetch.policies import load_policies, load_rests, save_policies, save_rests
from pipelines.fetch.robots import Robots
from pipelines.sources import forgotten
from pipelines.sources.html_page import join, read_page
from pipelines.sources.site import BLOCKED, FULL_DISK, ROBOTS_FILE, is_blocked, read_pages, without_dead
from pipelines.sources.site_cache import (
    VALIDATORS,
    conditions,
    load_unchanging,
    place,
    save_unchanging,
    unchanged,
    validators,
)
from pipelines.sources.site_sitemap import MAX_BYTES, read_sitemap

CONNECTIONS = 16
REDIRECT_ROUNDS = 5
SITEMAP_ROUNDS = 4  # robots.txt, a list of lists, a list, and a redirect among them
MAX_SITEMAPS = 200
SYNC_EVERY = 32  # pages
BLANK: dict[str, Any] = {"images": [], "links": [], "opt_out": None, "cut": 0, "failure": None, "redirect": None}
PAGES = frozenset({"text/html", "application/xhtml+xml"})
NOT_PAGES = tuple(f".{name}" for name in IGNORED_EXTENSIONS)


class PageFailed(Exception):
    """A page that could not be had."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.reason)


def only_pages(headers: Headers) -> Failure | None:
    kind = headers.get("Content-Type", "text/html").partition(";")[0].strip().lower()
    return None if kind in PAGES else Failure("permanent", "not_a_page")


class GuardedHandler:
    """Scrapy's download handler over the guarded client; one attempt series, no redirects."""

    lazy = False

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._client: Client | None = None
        self._robots: Robots | None = None
        self._slots, self._one_map = asyncio.Semaphore(CONNECTIONS), asyncio.Semaphore(1)  # sitemaps may be large

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "GuardedHandler":
        return cls(crawler.settings["PAIRMILL"])

    async def download_request(self, request: Request) -> Response:
        config = self._config
        if self._client is None or self._robots is None:  # the loop runs only now
            allow = networks(config["allow"], "source")
            self._client = open_client(config["agent"], config["per_host"], CONNECTIONS, allow)
            store = place(config)[0]
            self._client.rest(load_rests(store))
            bar = Blocklists(frozenset(config["blocked"])).bar(Workspace(store).tombstones())
            self._robots = Robots(self._client, load_policies(store), bar)
        limits = Limits(config["deadline_s"], config["max_page_bytes"], redirects=None, attempts=config["attempts"])
        url, judge, accept, turn = request.meta["as_found"], only_pages, ", ".join(PAGES), self._slots
        if request.meta.get("map") == "robots":
            named = await self._robots.sitemaps(URL(url))
            return HtmlResponse(url, body="\n".join(named).encode(), request=request)
        if request.meta.get("map"):
            judge, accept, turn = any_headers, "application/xml, text/xml, */*;q=0.1", self._one_map
            limits = replace(limits, max_bytes=MAX_BYTES + 1, cut=True)  # that it is cut shows by its size
        ask = {"Accept": accept, **request.meta["conditions"]}
        async with turn:
            answer = await self._client.fetch(url, limits, self._robots.permit, judge, ask)
        if isinstance(answer.result, Failure):
            raise PageFailed(answer.result)
        url, status, headers, body = answer.result
        names = ("Content-Type", "X-Robots-Tag", "TDM-Reservation", "Location", *VALIDATORS)
        kept = {n: [v.encode("utf-8", "replace") for v in headers.getall(n)] for n in names if n in headers}
        return HtmlResponse(url, status, kept, body, request=request)

    async def close(self) -> None:
        if self._client and self._robots:
            await self._client.session.close()
            store = place(self._config)[0]
            save_policies(store, self._robots.policies)
            save_rests(store, self._client.rests())


SETTINGS: dict[str, Any] = {
    "DOWNLOAD_HANDLERS": {
        **dict.fromkeys(("http", "https"), GuardedHandler),
        **dict.fromkeys(("data", "file", "ftp", "s3")),
    },
    "DOWNLOADER_MIDDLEWARES_BASE": {},
    "SPIDER_MIDDLEWARES_BASE": {},
    "EXTENSIONS_BASE": {},
    "TELNETCONSOLE_ENABLED": False,
    "RANDOMIZE_DOWNLOAD_DELAY": False,
    "CONCURRENT_REQUESTS": CONNECTIONS,
    "LOG_LEVEL": "WARNING",
}


class SiteSpider(Spider):
    """Walks level by level. A page is known by its canonical URL and asked for as the first link to it had it;
    `_pages` are the finished ones, by canonical URL."""

    name = "site"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._config = config
        self._robots = list(_spelled(str(URL(seed).origin() / "robots.txt") for seed in config["seeds"]))
        self._hosts = {URL(seed).host for seed in config["seeds"]} | set(config["hosts"])
        path = Path(config["pages"])
        self._blocked = Blocklists(frozenset(config["blocked"]))
        self._pages = {page["key"]: _ways(page) for page in read_pages(path) if self._stands(page)}
        self._maps = {found["sitemap"]: found for found in read_pages(path, "sitemap") if self._stands(found)}
        self._before = load_unchanging(config)
        self._dead = Workspace(place(config)[0]).tombstones()
        _end_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._unsynced = self._waiting = 0
        self._ready = asyncio.Event()
        self.error: BaseException | None = None

    async def start(self) -> AsyncIterator[Request]:
        async for request in self._sitemaps():
            yield request
        listed = (link for key in sorted(self._maps) for link in self._maps[key]["links"])
        level, seen = _spelled([*self._config["seeds"], *listed]), set[str]()
        for _ in range(self._config["max_depth"] + 1):
            wave, level = level, {}
            for _ in range(REDIRECT_ROUNDS + 1):
                room = self._config["max_pages"] - len(seen)
                fresh = sorted(key for key in wave.keys() - seen if self._within(key))[:room]
                seen.update(fresh)
                async for request in self._wave([key for key in fresh if key not in self._pages], wave):
                    yield request
                if self.error:
                    return
                level = _spelled(link for key in fresh for link in self._pages[key][0]) | level
                wave = _spelled(target for key in fresh if (target := self._pages[key][1]))

    def _stands(self, line: dict[str, Any]) -> bool:
        """Whether a record holds; one that blocklists have to do with is made anew, for they may have changed."""
        return line["failure"] not in (BLOCKED, ROBOTS_FILE) and not is_blocked(line, self._blocked)

    async def _wave(self, missing: list[str], spelled: dict[str, str], kind: str = "") -> AsyncIterator[Request]:
        """Asks for the addresses and waits until all are recorded."""
        self._waiting = len(missing)
        self._ready.clear()
        for key in missing:
            meta: dict[str, Any] = {"key": key, "as_found": spelled[key]}
            meta["map"] = "robots" if kind and key in self._robots else kind
            meta["conditions"] = {} if kind else conditions(self._before.get(key))
            yield Request(key, self.parse, errback=self.failed, dont_filter=True, meta=meta)
        if missing:
            await self._ready.wait()

    async def _sitemaps(self) -> AsyncIterator[Request]:
        """Reads the sitemaps that robots.txt of the seeds' hosts and the settings name, and those that these name."""
        told = _spelled([*self._config["sitemaps"], *self._robots])
        wave, seen, room = {key: told[key] for key in told if not forgotten(self._dead, key)}, set[str](), MAX_SITEMAPS
        for rounds in reversed(range(SITEMAP_ROUNDS)):
            fresh = sorted(wave)
            seen.update(fresh)
            async for request in self._wave([key for key in fresh if key not in self._maps], wave, "sitemap"):
                yield request
            if self.error:
                return
            wave = self._named(fresh, seen, room if rounds else 0)
            room -= len(wave)

    def _named(self, keys: list[str], seen: set[str], room: int) -> dict[str, str]:
        """At most `room` new sitemaps that those at `keys` name; what is left is counted in the `cut` of these."""
        wave: dict[str, str] = {}
        for key in keys:
            named, kept = _spelled(self._maps[key]["more"]), list[str]()
            for other, spelled in named.items():
                if other not in seen and len(wave) < room and self._may_name(key, other):
                    wave.setdefault(other, spelled)
                if other in seen or other in wave:
                    kept.append(spelled)
            if len(kept) < len(named):
                self._maps[key] |= {"more": kept, "cut": self._maps[key]["cut"] + len(named) - len(kept)}
                self._append(self._maps[key])
        return wave

    def _may_name(self, key: str, other: str) -> bool:
        """robots.txt may name sitemaps anywhere, a sitemap those on its own host and on the crawl's."""
        try:
            url = URL(other)
        except ValueError:
            return False
        near = key in self._robots or url.host in self._hosts | {URL(key).host}
        return near and refuse_url(url) is None and not forgotten(self._dead, other)

    def _within(self, url: str) -> bool:
        try:
            parts = URL(url)
        except ValueError:
            return False
        known = parts.host in self._hosts and not parts.path.lower().endswith(NOT_PAGES)
        return known and not forgotten(self._dead, url)

    def parse(self, response: Response, **_: Any) -> None:
        assert isinstance(response, HtmlResponse) and response.request
        request = response.request
        try:
            try:
                found = self._read_map(response) if request.meta["map"] else self._read_page(response, request)
            except OSError:
                raise
            except Exception:  # whatever a stranger wrote, it costs its own page alone
                self.logger.exception("a page that can't be read: %s", request.meta["key"])
                found = {"failure": "broken_page"}
            if request.meta["map"]:
                self._record_map(request, found)
            else:
                self._record({**_place(request), **found})
        except Exception as error:
            self._stop(error)

    def _read_page(self, response: HtmlResponse, request: Request) -> dict[str, Any]:
        headers = [(k.decode(), v.decode()) for k, values in response.headers.items() for v in values]
        if response.status == 304:
            return unchanged(self._before[request.meta["key"]], headers, self._config["agent"])
        if response.status in REDIRECTS:
            target = _target(response)
            return {"failure": "redirected" if target else "bad_redirect", "redirect": target}
        read = read_page(response.url, response.body, headers, self._config["agent"])
        return read | ({} if read.pop("dated") else validators(headers))

    def failed(self, failure: TwistedFailure) -> None:
        error = failure.value
        if isinstance(error, PageFailed):
            request: Request = failure.request  # type: ignore[attr-defined]
            if request.meta["map"]:
                self._record_map(request, {"failure": error.failure.reason})
            else:
                self._record({**_place(request), "failure": error.failure.reason})
        else:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self.error = error
        self.logger.error("the crawl stops", exc_info=error)
        self._ready.set()

    def _read_map(self, response: HtmlResponse) -> dict[str, Any]:
        if response.request and response.request.meta["map"] == "robots":
            return {"more": response.text.splitlines(), "failure": ROBOTS_FILE}
        if response.status in REDIRECTS:
            return {"more": [target] if (target := _target(response)) else [], "failure": "redirected"}
        found = read_sitemap(response.body)
        return found | {"links": [link for link in found["links"] if self._within(link)]}

    def _record_map(self, request: Request, found: dict[str, Any]) -> None:
        key = request.meta["key"]
        self._maps[key] = self._living({"sitemap": key, "links": [], "more": [], "cut": 0} | found)
        self._write(self._maps[key])

    def _living(self, line: dict[str, Any]) -> dict[str, Any]:
        kept = without_dead(line, self._dead)
        assert kept is not None, "what is forgotten isn't asked for"
        return kept

    def _record(self, page: dict[str, Any]) -> None:
        page = self._living(page)
        self._pages[page["key"]] = _ways(page)
        self._write(page)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._unsynced += 1

    def _write(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._waiting -= 1
        if self._unsynced >= SYNC_EVERY or not self._waiting:
            os.fsync(self._file.fileno())
            self._unsynced = 0
        if not self._waiting:
            self._ready.set()


def _spelled(urls: Iterable[str]) -> dict[str, str]:
    """The first spelling of each address, by its canonical form."""
    spelled: dict[str, str] = {}
    for url in urls:
        spelled.setdefault(canonical_url(url), url.strip().partition("#")[0])
    return spelled


def _place(request: Request) -> dict[str, Any]:
    return {**BLANK, "key": request.meta["key"], "url": request.meta["as_found"]}


def _ways(page: dict[str, Any]) -> tuple[list[str], str | None]:
    return page["links"], page["redirect"]


def _target(response: Response) -> str | None:
    target = join(response.url, (response.headers.get("Location") or b"").decode())
    return target.partition("#")[0] if target else None


def _end_torn_line(path: Path) -> None:
    """Cuts what a kill left of a line, so that the next one starts clean."""
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    throttle = {"DOWNLOAD_DELAY": config["delay_s"], "CONCURRENT_REQUESTS_PER_DOMAIN": config["per_host"]}
    process = AsyncCrawlerProcess({**SETTINGS, **throttle, "PAIRMILL": config})
    crawler = process.create_crawler(SiteSpider)
    process.crawl(crawler, config)
    process.start()
    spider = crawler.spider
    if isinstance(spider, SiteSpider) and isinstance(spider.error, OSError) and spider.error.errno in FULL:
        sys.exit(FULL_DISK)
    if not isinstance(spider, SiteSpider) or spider.error:
        sys.exit(1)
    save_unchanging(config)


if __name__ == "__main__":
    main()
