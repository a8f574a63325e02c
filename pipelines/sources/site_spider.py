"""The crawl's own process: `python -m pipelines.sources.site_spider CONFIG.json`.

Scrapy schedules, throttles per host and parses; every request goes through our guarded client, which also asks
robots.txt, retries and bounds. Scrapy's middlewares and extensions are off: redirects are followed by the walk
itself, as links that cost no depth, so that each hop is judged anew. A level is walked to its end before the next.
What an earlier crawl read of a page that is unchanged since (304 to its ETag or Last-Modified) is read once.
"""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from scrapy import Request, Spider
from scrapy.crawler import AsyncCrawlerProcess, Crawler
from scrapy.http import HtmlResponse, Response
from scrapy.linkextractors import IGNORED_EXTENSIONS
from twisted.python.failure import Failure as TwistedFailure
from yarl import URL

from pairs.identity import canonical_url
from pairs.store import FULL, Store
from pipelines.fetch.client import REDIRECTS, Client, Failure, Headers, Limits, open_client
from pipelines.fetch.guard import networks
from pipelines.fetch.policies import load_policies, save_policies
from pipelines.fetch.robots import RESERVED, Robots, opt_out
from pipelines.sources.site import FULL_DISK, VERSION, read_pages
from pipelines.sources.site_page import read_page

CONNECTIONS = 16
CONDITION = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
VALIDATORS = tuple(CONDITION)
VALIDATOR_CHARS = 1000
NAME = "translate(@name, 'DEMNORSTIVA', 'demnorstiva')"
RESERVATION = f"//meta[{NAME}='tdm-reservation']/@content"
REDIRECT_ROUNDS = 5
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

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "GuardedHandler":
        return cls(crawler.settings["PAIRMILL"])

    async def download_request(self, request: Request) -> Response:
        config = self._config
        if self._client is None or self._robots is None:  # the loop runs only now
            allow = networks(config["allow"], "source")
            self._client = open_client(config["agent"], config["per_host"], CONNECTIONS, allow)
            self._robots = Robots(self._client, load_policies(Store(config["workspace"])))
        limits = Limits(config["deadline_s"], config["max_page_bytes"], redirects=None, attempts=config["attempts"])
        url = request.meta["as_found"]
        ask = {"Accept": ", ".join(PAGES), **request.meta["conditions"]}
        answer = await self._client.fetch(url, limits, self._robots.permit, only_pages, ask)
        if isinstance(answer.result, Failure):
            raise PageFailed(answer.result)
        url, status, headers, body = answer.result
        names = ("Content-Type", "X-Robots-Tag", "Location", "TDM-Reservation", *VALIDATORS)
        kept = {name: headers.getall(name) for name in names if name in headers}
        return HtmlResponse(url, status, kept, body, request=request)

    async def close(self) -> None:
        if self._client and self._robots:
            await self._client.session.close()
            save_policies(Store(self._config["workspace"]), self._robots.policies)


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
        self._hosts = {URL(seed).host for seed in config["seeds"]} | set(config["hosts"])
        path = Path(config["pages"])
        self._pages = {page["key"]: _ways(page) for page in read_pages(path)}
        self._before = load_unchanging(config)
        _end_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._unsynced = self._waiting = 0
        self._ready = asyncio.Event()
        self.error: BaseException | None = None

    async def start(self) -> AsyncIterator[Request]:
        level, seen = _spelled(self._config["seeds"]), set[str]()
        for _ in range(self._config["max_depth"] + 1):
            wave, level = level, {}
            for _ in range(REDIRECT_ROUNDS + 1):
                room = self._config["max_pages"] - len(seen)
                fresh = sorted(key for key in wave.keys() - seen if self._within(key))[:room]
                seen.update(fresh)
                missing = [key for key in fresh if key not in self._pages]
                self._waiting = len(missing)
                self._ready.clear()
                for key in missing:
                    meta = {"key": key, "as_found": wave[key], "conditions": _conditions(self._before.get(key))}
                    yield Request(key, self.parse, errback=self.failed, dont_filter=True, meta=meta)
                if missing:
                    await self._ready.wait()
                if self.error:
                    return
                level = _spelled(link for key in fresh for link in self._pages[key][0]) | level
                wave = _spelled(target for key in fresh if (target := self._pages[key][1]))

    def _within(self, url: str) -> bool:
        try:
            parts = URL(url)
        except ValueError:
            return False
        return parts.host in self._hosts and not parts.path.lower().endswith(NOT_PAGES)

    def parse(self, response: Response, **_: Any) -> None:
        assert isinstance(response, HtmlResponse) and response.request
        try:
            if response.status == 304:
                found = _unchanged(self._before[response.request.meta["key"]], response, self._config["agent"])
            elif response.status in REDIRECTS:
                found = {"failure": "redirected", "redirect": _target(response)}
            else:
                found = read_page(response, self._config["agent"]) | _validators(response)
                found["opt_out"] = found["opt_out"] or _reserved(response)
            self._record({**_place(response.request), **found})
        except Exception as error:
            self._stop(error)

    def failed(self, failure: TwistedFailure) -> None:
        error = failure.value
        if isinstance(error, PageFailed):
            request: Request = failure.request  # type: ignore[attr-defined]
            self._record({**_place(request), "failure": error.failure.reason})
        else:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self.error = error
        self.logger.error("the crawl stops", exc_info=error)
        self._ready.set()

    def _record(self, page: dict[str, Any]) -> None:
        self._file.write(json.dumps(page).encode() + b"\n")
        self._unsynced += 1
        self._waiting -= 1
        if self._unsynced >= SYNC_EVERY or not self._waiting:
            os.fsync(self._file.fileno())
            self._unsynced = 0
        self._pages[page["key"]] = _ways(page)
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


def _conditions(page: dict[str, Any] | None) -> dict[str, str]:
    """The request headers that ask whether `page` has changed."""
    return {CONDITION[name]: page[name] for name in VALIDATORS if page.get(name)} if page else {}


def _validators(response: HtmlResponse) -> dict[str, str]:
    found = {name: (response.headers.get(name) or b"").decode("latin-1") for name in VALIDATORS}
    return {name: value for name, value in found.items() if value and len(value) <= VALIDATOR_CHARS}


def _unchanged(before: dict[str, Any], response: HtmlResponse, agent: str) -> dict[str, Any]:
    """The earlier record, under an opt-out that the header may have brought since."""
    values = [value.decode("latin-1") for value in response.headers.getlist("X-Robots-Tag")]
    return before | {"opt_out": before["opt_out"] or opt_out(values, agent) or _reserved(response)}


def _reserved(response: HtmlResponse) -> str | None:
    """Whether the TDM Reservation Protocol's header or meta tag keeps the page's content from us."""
    header = (response.headers.get("TDM-Reservation") or b"").strip() == b"1"
    meta = response.status != 304 and response.xpath(RESERVATION).getall()
    return RESERVED if header or any(value.strip() == "1" for value in meta or []) else None


def load_unchanging(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pages of the latest crawl that have a validator, by canonical URL; none where another program read them."""
    path = Path(config["cache"])
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines or json.loads(lines[0]) != _reader(config):
        return {}
    return {page["key"]: page for page in map(json.loads, lines[1:])}


def save_unchanging(config: dict[str, Any]) -> None:
    """Keeps this crawl's pages that have a validator, for the next one; those it didn't meet any more are let go."""
    pages = (page for page in read_pages(Path(config["pages"])) if any(page.get(name) for name in VALIDATORS))
    lines = (json.dumps(line) + "\n" for line in itertools.chain([_reader(config)], pages))
    store = Store(config["workspace"])
    with store.writing(str(Path(config["cache"]).relative_to(store.root))) as file:
        file.writelines(line.encode() for line in lines)


def _reader(config: dict[str, Any]) -> dict[str, Any]:
    """What a record of a page depends on beside the page."""
    return {"site": VERSION, "agent": config["agent"]}


def _target(response: Response) -> str | None:
    location = response.headers.get("Location")
    return response.urljoin(location.decode("latin-1")).partition("#")[0] if location else None


def _end_torn_line(path: Path) -> None:
    """Cuts what a kill left of a line, so that the next one starts clean."""
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    place = Path(config["pages"])  # <workspace>/crawl/<source>/<increment>/pages.jsonl
    config["workspace"] = str(place.parents[3])
    config["cache"] = str(place.parents[3] / "cache" / "pages" / f"{place.parts[-3]}.jsonl")
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
