"""`site`: crawls pages from seed URLs and yields their images with the texts that stand around them.

Scrapy crawls in a child process that dies with its parent (`site_spider.py`) and appends one JSON line per finished
page to `crawl/<source>/<increment>/pages.jsonl`. A killed crawl goes on from the pages it recorded and never asks
for these again. It walks level by level in order of URL, so that also a crawl that `max_pages` ends takes the same
pages whatever the timing.
"""

import contextlib
import fcntl
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from yarl import URL

from pairs.errors import PairmillError
from pairs.fingerprint import fingerprint
from pairs.process import ROOT, child
from pairs.store import advice, no_space
from pairs.workspace import Dead
from pipelines.fetch.blocklists import Blocklists, load_blocklists
from pipelines.fetch.client import require_contact
from pipelines.fetch.guard import networks, refuse_url
from pipelines.sources import Context, Row, forgotten

VERSION = 6  # raise it when an equal page gives another record
POLL_S = 0.2
LOG_CHARS = 2000
ORPHAN_S = 10.0  # how long the crawler of a killed run may take to end
BLOCKED = "block_host"
ROBOTS_FILE = "robots.txt"  # the `failure` of a record that holds the sitemaps that one names
FULL_DISK = 28  # its exit code where no space was left


@dataclass(frozen=True)
class Source:
    """Follows links on the hosts of `seeds` and on `hosts`, and takes the pages there that sitemaps list, those of
    robots.txt and of `sitemaps`, as seeds too. At most `max_depth` links away from a seed and at most
    `max_pages` pages. `delay_s` seconds pass between two requests to a host, of which `per_host` run at a time."""

    seeds: list[str]
    hosts: list[str] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)
    max_pages: int = 10_000
    max_depth: int = 16
    delay_s: float = 0.25
    per_host: int = 2
    max_page_bytes: int = 5_000_000

    def candidates(self, context: Context) -> Iterator[Row]:
        self._check(context)
        local = context.workspace.store.local
        if local is None:
            raise PairmillError(
                expected="a workspace on local disk for a `site` source, whose crawl is recorded page by page",
                found=context.workspace.store.root,
                remedy="crawl into a local workspace, then copy it",
            )
        folder = local / "crawl" / context.name / context.increment
        with advice(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / "pages.jsonl") as lock:
                pages = self._prepare(folder, context)
                self._crawl(folder, pages, context, lock)
        failures: Counter[str] = Counter()
        blocked = load_blocklists(context.fetch.block)
        for page in read_pages(pages):
            if is_blocked(page, blocked):
                page |= {"failure": BLOCKED, "images": [], "cut": 0}
            failures[page["failure"] or "ok"] += 1
            context.pages["cut"] += page["cut"] > 0
            yield from _rows(page)
        context.pages.update(failures)
        for found in read_pages(pages, "sitemap"):
            context.pages["cut"] += found["cut"] > 0
            context.pages[f"sitemap_{found['failure'] or 'ok'}"] += found["failure"] != ROBOTS_FILE
        if not failures["ok"]:
            context.workspace.store.delete(f"crawl/{context.name}", recursive=True)
            raise PairmillError(
                expected=f"a page at sources.{context.name}.seeds: {', '.join(self.seeds)}",
                found="; ".join(f"{count} × {reason}" for reason, count in sorted(failures.items())) or "none",
                remedy="check the address, that the server runs, and `allow` where it is a local network",
            )

    def _check(self, context: Context) -> None:
        where = f"sources.{context.name}"
        networks(context.allow, where)
        for name, urls in {"seeds": self.seeds or [""], "sitemaps": self.sitemaps}.items():
            for url in urls:
                if refuse_url(URL(url)):
                    raise PairmillError(
                        expected=f"http or https addresses at {where}.{name}", found=repr(url), remedy="correct them"
                    )
        named = [*self.seeds, *self.sitemaps]
        require_contact(context.fetch.agent, [*(URL(url).host or "" for url in named), *self.hosts])

    def _prepare(self, folder: Path, context: Context) -> Path:
        """The file of finished pages, begun anew where it was recorded with other settings; blocklists may change."""
        fetch = {name: getattr(context.fetch, name) for name in ("agent", "deadline_s", "attempts")}
        blocked = sorted(load_blocklists(context.fetch.block).hosts)
        config: dict[str, Any] = {**asdict(self), **fetch, "allow": list(context.allow)}
        pages, mark = folder / "pages.jsonl", fingerprint({"site": VERSION, **config})
        recorded = next(iter(_lines(pages)), {})
        if recorded.get("settings") != mark:
            pages.write_text(json.dumps({"settings": mark}) + "\n")
        (folder / "config.json").write_text(json.dumps({**config, "blocked": blocked, "pages": str(pages.resolve())}))
        return pages

    def _crawl(self, folder: Path, pages: Path, context: Context, lock: int) -> None:
        command = [sys.executable, "-m", "pipelines.sources.site_spider", str((folder / "config.json").resolve())]
        with (
            (folder / "log.txt").open("wb") as log,
            child(command, folder=ROOT, stdout=log, stderr=log, keep=[lock], patience_s=0.1) as crawler,
            pages.open("rb") as file,
        ):
            lines = 0
            while _still_runs(crawler):
                lines += file.read().count(b"\n")
                context.progress(lines - 1, self.max_pages, f"{lines - 1} pages")
        if crawler.returncode == FULL_DISK:
            raise no_space(str(pages))
        if crawler.returncode != 0:
            tail = (folder / "log.txt").read_text(errors="replace")[-LOG_CHARS:]
            raise RuntimeError(f"the crawl ended with exit code {crawler.returncode}:\n{tail}")


@contextlib.contextmanager
def _alone(pages: Path) -> Iterator[int]:
    """Lets one crawl at a time have `pages`. The crawler gets the handle too: the kernel drops the lock when the last
    process that holds it has ended, so that of an orphan and a new crawler only one ever appends."""
    until = time.monotonic() + ORPHAN_S
    with pages.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise PairmillError(
                        expected=f"no other crawler that writes {pages}",
                        found="one that still runs, left by an earlier run",
                        remedy="wait until it has ended, or end it, then run the same command again",
                    ) from None
                time.sleep(POLL_S)
        yield file.fileno()


def _still_runs(crawler: "subprocess.Popen[bytes]") -> bool:
    try:
        crawler.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; a last line that was torn by a kill is left out."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


def read_pages(path: Path, kind: str = "url") -> Iterator[dict[str, Any]]:
    """The finished pages that a crawl recorded, or with "sitemap" the sitemaps; of one recorded again the last."""
    name = "key" if kind == "url" else kind
    last = {line[name]: number for number, line in enumerate(_lines(path)) if kind in line}
    return (line for number, line in enumerate(_lines(path)) if kind in line and last[line[name]] == number)


def is_blocked(line: dict[str, Any], blocked: Blocklists) -> bool:
    """Whether a crawl's record, of a page or a sitemap, is one of a host that is blocked now."""
    return blocked.host(URL(line.get("key") or line["sitemap"]).host or "") is not None


def without_dead(line: dict[str, Any], dead: Dead) -> dict[str, Any] | None:
    """A crawl's record, of a page or a sitemap, without the addresses that are forgotten; None where it is one."""
    if not any(dead.values()):
        return line
    if forgotten(dead, line.get("url") or line.get("sitemap") or ""):
        return None
    kept = {n: [url for url in line[n] if not forgotten(dead, url)] for n in ("links", "more") if n in line}
    images = [image for image in line.get("images", ()) if not forgotten(dead, image["url"])]
    onward = line.get("redirect")
    return (
        line
        | kept
        | ({"images": images} if "images" in line else {})
        | ({"redirect": None} if onward and forgotten(dead, onward) else {})
    )


def _rows(page: dict[str, Any]) -> Iterator[Row]:
    for position, image in enumerate(page["images"]):
        yield {**image, "page": page["url"], "opt_out": page["opt_out"], "position": position}
