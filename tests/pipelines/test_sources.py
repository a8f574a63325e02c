"""Sources: what they yield from folders, tables and pages, what they refuse, and a crawl that is killed."""

import asyncio
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from fsspec.implementations.local import LocalFileOpener
from scrapy import Request
from scrapy.http import HtmlResponse

from pairs import process
from pairs.errors import PairmillError
from pairs.identity import local_key, url_key
from pairs.process import ROOT
from pairs.recipe import BlockSpec, FetchSpec, SourceSpec
from pairs.tar import TarWriter
from pairs.workspace import Workspace
from pipelines.candidates import CutCounts, cut_increment, part
from pipelines.fetch.shards import fetch_increment
from pipelines.sources import Context, Outside, load_source, webdataset
from pipelines.sources.folder import Source
from pipelines.sources.html_page import read_page
from pipelines.sources.site import _alone
from pipelines.sources.site_sitemap import read_sitemap
from pipelines.sources.site_spider import SiteSpider
from pipelines.takedown import forget
from tests.pipelines.small_web import ALLOW, SmallWeb, picture, redirect, small_web, with_headers


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", create=True)


def quiet(done: int, total: int, note: str) -> None:
    pass


def spec(**settings: Any) -> SourceSpec:
    return SourceSpec.model_validate(settings)


def rows_of(workspace: Workspace, **settings: Any) -> list[dict[str, Any]]:
    cut_increment(workspace, "src", spec(**settings), FetchSpec(), quiet)
    return workspace.store.read_table(part("src", "0000")).to_pylist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sites", "seeds": []}, "did you mean 'site'"),
        ({"kind": "site_spider"}, "use one of: folder, site, urls|did you mean 'site'"),
        ({"kind": "site", "seed": ["http://a.test/"]}, "did you mean 'seeds'"),
        ({"kind": "urls", "path": 3}, "valid string"),
    ],
)
def test_bad_settings_are_advice(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PairmillError, match=message):
        load_source("src", spec(**settings))


def test_folder(workspace: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.PNG").write_bytes(picture())
    (root / "sub" / "a.txt").write_text("one caption\n\n  another \n")
    (root / "b.jpg").write_bytes(picture(kind="JPEG"))
    (root / "notes.md").write_text("no image")
    (tmp_path / "secret.png").write_bytes(picture())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path)
    rows = rows_of(workspace, kind="folder", path=str(root))
    found = {row["url"]: [t["text"] for t in row["texts"]] for row in rows}
    assert found == {"src:sub/a.PNG": ["one caption", "another"], "src:b.jpg": []}
    assert {row["url_key"] for row in rows} == {local_key("src", "sub/a.PNG"), local_key("src", "b.jpg")}


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "link.png", "away/secret.png", "pipe.png", "sub/../x.png"]
)
def test_folder_reads_nothing_outside_itself(path: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "x.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    assert Source(str(root)).read("x.png", 3) == b"insi"
    with pytest.raises(Outside):
        Source(str(root)).read(path, 100)


TABLE = {"URL": ["http://a.test/1.png", "http://a.test/2.png"], "TEXT": ["one", None], "LICENSE": ["cc0", None]}
COLUMNS = {"url": "URL", "text": "TEXT", "license": "LICENSE"}


def write_tables(folder: Path) -> None:
    pq.write_table(pa.table(TABLE), folder / "t.parquet")
    (folder / "t.csv").write_text("URL,TEXT,LICENSE\nhttp://a.test/1.png,one,cc0\nhttp://a.test/2.png,,\n")
    lines = [dict(zip(TABLE, values, strict=True)) for values in zip(*TABLE.values(), strict=True)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.p*"])
def test_urls_reads_every_kind_of_table(name: str, workspace: Workspace, tmp_path: Path) -> None:
    write_tables(tmp_path)
    rows = rows_of(workspace, kind="urls", path=str(tmp_path / name), columns=COLUMNS)
    found = {row["url"]: ([t["text"] for t in row["texts"]], row["license"] or None) for row in rows}
    assert found == {"http://a.test/1.png": (["one"], "cc0"), "http://a.test/2.png": ([], None)}


def test_urls_reads_any_fsspec_address(workspace: Workspace) -> None:
    with fsspec.open("memory://lists/t.jsonl", "w") as file:
        file.write('{"url": "http://a.test/1.png", "text": "one"}\n')
    assert len(rows_of(workspace, kind="urls", path="memory://lists/t.jsonl")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "t.parquet", "columns": {"url": "url"}}, "a column 'url'"),
        ({"path": "t.parquet", "columns": {"urls": "URL"}}, "did you mean 'url'"),
        ({"path": "none.parquet"}, "no file"),
        ({"path": "bad.jsonl"}, "line 2"),
        ({"path": "bad.parquet"}, "whole .parquet"),
        ({"path": "t.txt"}, "rename or convert"),
    ],
)
def test_urls_says_what_is_wrong(settings: dict[str, Any], message: str, workspace: Workspace, tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"url": "http://a.test/"}\n{"url":')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "t.txt").write_text("")
    settings = settings | {"path": str(tmp_path / settings["path"])}
    with pytest.raises(PairmillError, match=message):
        rows_of(workspace, kind="urls", **settings)
    assert workspace.store.files("candidates") == []


PAGE = """<html lang="en"><head><title>The page</title><base href="/media/">
<meta name="Robots" content="noarchive"><meta name="otherbot" content="noai"></head><body>
<img src="a.png" alt="An apple" title="tip"><img alt="no source">
<div lang="DE"><figure><img src="http://b.test/b.png" alt="Birne">
<figcaption>Eine <b>Birne</b></figcaption></figure></div>
<img src="data:image/png;base64,AAAA" alt="inline">
<a href="next.html#x">n</a><a rel="nofollow" href="hidden.html">h</a>
<a href="mailto:a@b.c">m</a><a href="http://[bad">b</a>
</body></html>"""


def page(body: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    return read_page("http://a.test/x/y.html", body.encode(), [*(headers or {}).items()], "pairmill/1 (+x)")


def test_extraction() -> None:
    found = page(PAGE)
    apple, pear, inline = found["images"]
    assert apple["url"] == "http://a.test/media/a.png" and pear["url"] == "http://b.test/b.png"
    assert [(t["text"], t["kind"], t["language"]) for t in apple["texts"]] == [
        ("An apple", "alt", "en"),
        ("tip", "img_title", "en"),
        ("The page", "title", "en"),
    ]
    assert [" ".join(t["text"].split()) for t in pear["texts"]] == ["Birne", "Eine Birne", "The page"]
    assert [t["language"] for t in pear["texts"]] == ["de", "de", "en"] and pear["found"] == "figure"
    assert inline["url"] == "data:"
    assert found["links"] == ["http://a.test/media/next.html"] and found["opt_out"] is None


@pytest.mark.parametrize(
    ("meta", "headers", "opt", "links"),
    [
        ("noai", {}, "noai", 1),
        ("noimageai, nofollow", {}, "noimageai", 0),
        ("none", {}, "none", 0),
        ("all", {"X-Robots-Tag": "noindex"}, "noindex", 1),
        ("all", {"X-Robots-Tag": "otherbot: noindex"}, None, 1),
    ],
)
def test_opt_out_of_a_page(meta: str, headers: dict[str, str], opt: str | None, links: int) -> None:
    body = f'<meta name="robots" content="{meta}"><img src="a.png"><a href="b.html">b</a>'
    found = page(body, headers)
    assert (found["opt_out"], len(found["links"]), len(found["images"])) == (opt, links, 1)


@pytest.mark.parametrize("nest", ["<div>", "<figure>", "<figure><figcaption>x", "<picture><source srcset='a 1w'>"])
def test_nested_markup_costs_no_more_than_its_size(nest: str) -> None:
    elements = 600 * nest.count("<") + 1500
    steps = 0

    def count(*event: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        found = page(nest * 600 + '<img src="a.png">' * 1500)
    finally:
        sys.setprofile(None)
    assert (len(found["images"]), found["cut"]) == (1500, 0)
    assert steps < 250 * elements  # calls, in C and in Python; a way up or down from each image makes far more


def test_what_a_page_has_too_much_of_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.html_page.MAX_IMAGES", 3)
    found = page('<img src="a.png">' * 5 + '<a href="b.html">b</a>')
    assert (len(found["images"]), len(found["links"]), found["cut"]) == (3, 1, 2)
    deep = page("<div>" * 2100 + '<img src="a.png">')
    assert deep["cut"] > 0


def test_too_much_of_a_page_reaches_the_counts(workspace: Workspace) -> None:
    routes = {"/": '<img src="a.png">' * 2003, "/robots.txt": with_headers(b"", {}, 404)}
    with small_web(routes) as site:
        assert crawl(workspace, site).pages_cut == 1


def test_the_innermost_figure_with_a_caption_gives_it() -> None:
    found = page(
        "<figure><img src=1.png><figure><img src=2.png><figcaption>inner</figcaption></figure>"
        "<figure><img src=3.png></figure><figcaption>outer</figcaption></figure><img src=4.png>"
    )
    captions = [[t["text"] for t in image["texts"] if t["kind"] == "caption"] for image in found["images"]]
    assert captions == [["outer"], ["inner"], ["outer"], []]


def test_pages_and_images_are_asked_for_as_their_links_have_them(workspace: Workspace) -> None:
    asked: list[str] = []

    async def listed(request: web.Request) -> web.StreamResponse:
        asked.append(request.raw_path)
        return web.Response(text='<img src="/i.png?z=%2F&a=%7e#x" alt="signed">', content_type="text/html")

    start = link("/list?b=2&a=%7e1#top") + link("/list?a=~1&b=2")
    with small_web({"/": start, "/list": listed, "/robots.txt": with_headers(b"", {}, 404)}) as site:
        assert crawl(workspace, site).pages == {"ok": 2}
    assert asked == ["/list?a=~1&b=2"]  # two spellings of one page: the first in order
    with small_web({"/": link("/list?b=2&a=%7e1"), "/list": listed, "/robots.txt": with_headers(b"", {}, 404)}) as site:
        other = Workspace.open(Path(workspace.store.root) / "other", create=True)
        crawl(other, site)
        row = other.store.read_table(part("src", "0000")).to_pylist()[0]
        expected = site.url("/i.png?z=%2F&a=%7e")
    assert asked[1:] == ["/list?b=2&a=%7e1"]
    assert row["url"] == expected and row["page"].endswith("/list?b=2&a=%7e1")


ITS_OWN = '{"settings": "of the orphan"}\n'


def test_two_crawlers_never_write_one_record(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan of a killed run still holds its lock; its record stays as it is."""
    monkeypatch.setattr("pipelines.sources.site.ORPHAN_S", 0.0)
    pages = Path(workspace.store.root) / "crawl/src/0000/pages.jsonl"
    pages.parent.mkdir(parents=True)
    pages.write_text(ITS_OWN)
    with small_web(small_site()) as site, pages.open("ab") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        with pytest.raises(PairmillError, match="still runs"):
            crawl(workspace, site)
        assert pages.read_text() == ITS_OWN and site.asked == []
        fcntl.flock(orphan, fcntl.LOCK_UN)
        assert crawl(workspace, site).new == 14


def test_the_crawler_holds_the_lock_itself(tmp_path: Path) -> None:
    with _alone(tmp_path / "pages.jsonl") as lock:
        command = [sys.executable, "-c", "print('up', flush=True); input()"]
        orphan = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[lock])
        assert orphan.stdout and orphan.stdout.readline() == b"up\n"
    with pytest.raises(BlockingIOError), (tmp_path / "pages.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    orphan.communicate(b"\n")
    with _alone(tmp_path / "pages.jsonl"):
        pass


FULL = """
import errno, sys
from pipelines.sources import site_spider

def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

site_spider.SiteSpider._record = full
site_spider.main()
"""


FEW_SITEMAPS = """
from pipelines.sources import site_spider

site_spider.MAX_SITEMAPS = 3
site_spider.main()
"""


def crawler(code: str) -> Callable[..., Any]:
    """Starts the crawler's process with `code` in place of its module."""
    return lambda command, **more: process.child([command[0], "-c", code, command[-1]], **more)


def test_a_full_disk_under_the_crawler_is_said(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.site.child", crawler(FULL))
    with small_web(small_site()) as site, pytest.raises(PairmillError, match="no space left"):
        crawl(workspace, site)
    assert workspace.store.files("candidates") == []


def test_a_table_on_an_unknown_file_system_is_advice(workspace: Workspace) -> None:
    with pytest.raises(PairmillError, match="nowhere"):
        rows_of(workspace, kind="urls", path="nowhere://lists/t.jsonl")


def link(target: str) -> str:
    return f'<a href="{target}">on</a>'


def small_site(pages: int = 12) -> dict[str, Any]:
    links = "".join(link(f"/page{n}.html") for n in range(pages))
    routes: dict[str, Any] = {
        "/": f'<title>t</title><img src="0.png" alt="zero">{links}{link("/private/p.html")}{link("/moved")}',
        "/robots.txt": with_headers(b"User-agent: *\nDisallow: /private/", {}),
        "/private/p.html": "<img src=secret.png>",
        "/moved": redirect("/target.html"),
        "/target.html": '<img src="target.png" alt="target">' + link("http://elsewhere.test/") + link("/gone.html"),
    }
    for n in range(pages):
        routes[f"/page{n}.html"] = f'<img src="{n}.png" alt="number {n}"><img src="0.png" alt="again">{link("/")}'
    routes["/page0.html"] = '<meta name=robots content=noai><img src="opted.png" alt="no">'
    return routes


def crawl(workspace: Workspace, site: SmallWeb, **more: Any) -> CutCounts:
    settings = {"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, "delay_s": 0, **more}
    return cut_increment(workspace, "src", spec(**settings), FetchSpec(deadline_s=5, attempts=1), quiet)


def test_a_site_is_crawled_politely(workspace: Workspace) -> None:
    with small_web(small_site()) as site:
        counts = crawl(workspace, site)
        asked = sorted(site.asked)
    assert counts.pages == {"http_404": 1, "ok": 14, "redirected": 1, "robots": 1}
    assert counts.opt_out == 1 and counts.new == 14
    assert len(asked) == len(set(asked)) and "/private/p.html" not in asked
    rows = {row["url"].rpartition("/")[2]: row for row in workspace.store.read_table(part("src", "0000")).to_pylist()}
    assert rows["opted.png"]["opt_out"] == "noai" and rows["1.png"]["opt_out"] is None
    assert [t["text"] for t in rows["0.png"]["texts"]] == ["zero", "again", "t"]
    assert not workspace.store.files("crawl")


def test_pages_of_a_blocked_host_are_not_crawled(workspace: Workspace, tmp_path: Path) -> None:
    """Neither those that links and redirects lead to, nor its robots.txt."""
    (tmp_path / "hosts").write_text("127.0.0.2\n")
    with small_web({"/x.html": '<img src="x.png" alt="x">'}, "127.0.0.2") as bad:
        routes = {"/": f'<img src="a.png" alt="a">{link(bad.url("/x.html"))}{link("/on")}'}
        with small_web(routes | {"/on": redirect(bad.url("/y.html"))}) as site:
            settings = {"kind": "site", "seeds": [site.url("/")], "hosts": ["127.0.0.2"], "allow": ALLOW, "delay_s": 0}
            fetch = FetchSpec(attempts=1, block=BlockSpec(hosts=str(tmp_path / "hosts")))
            counts = cut_increment(workspace, "src", spec(**settings), fetch, quiet)
    assert counts.new == 1 and counts.pages == {"ok": 1, "redirected": 1, "block_host": 2} and bad.asked == []


def test_a_blocklist_that_changes_leaves_the_crawl_that_is_recorded(workspace: Workspace, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("")
    with (
        small_web({"/x.html": '<img src="x.png" alt="x">'}, "127.0.0.2") as other,
        small_web({"/": f'<img src="a.png" alt="a">{link(other.url("/x.html"))}'}) as site,
    ):
        settings = {"kind": "site", "seeds": [site.url("/")], "hosts": ["127.0.0.2"], "allow": ALLOW, "delay_s": 0}
        source = load_source("src", spec(**settings))
        fetch = FetchSpec(attempts=1, block=BlockSpec(hosts=str(hosts)))
        first, blocked, again = (Context(workspace, "src", "0000", tuple(ALLOW), fetch, quiet) for _ in range(3))
        assert len(list(source.candidates(first))) == 2 and +first.pages == {"ok": 2}
        hosts.write_text("127.0.0.2\n")
        assert [row["url"] for row in source.candidates(blocked)] == [site.url("/a.png")]
        assert +blocked.pages == {"ok": 1, "block_host": 1}
        assert (site.asked.count("/"), other.asked.count("/x.html")) == (1, 1)
        hosts.write_text("")
        assert len(list(source.candidates(again))) == 2 and again.pages == first.pages
        assert (site.asked.count("/"), other.asked.count("/x.html")) == (1, 2)


def raw(head: bytes) -> Any:
    """Answers with header bytes that no library would write."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.write(b"HTTP/1.1 " + head + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        request.transport.close()
        return web.Response()

    return answer


def test_no_page_and_no_header_ends_a_crawl(workspace: Workspace) -> None:
    odd = {
        "/bracket": raw(b"302 Found\r\nLocation: http://[bad"),
        "/latin": raw(b"302 Found\r\nLocation: /caf\xe9"),
        "/umlaut": raw("302 Found\r\nLocation: /ä".encode()),
        "/etag": raw(b'200 OK\r\nETag: "\xe9"\r\nX-Robots-Tag: \xff\r\nContent-Type: text/html'),
        "/comment": "<!doctype html>",
        "/date": '<meta name=robots content="unavailable_after: Mon 01 Jan 99999999999999999999 00:00:00 GMT">',
        "/ä": "<img src=umlaut.png alt=u>",
    }
    with small_web(odd | {"/": '<img src="a.png" alt="a">' + "".join(link(path) for path in odd)}) as site:
        counts = crawl(workspace, site)
    assert counts.new == 2 and counts.pages["bad_redirect"] == 1 and counts.pages["redirected"] == 2
    assert counts.pages["ok"] == 5


def test_a_page_that_breaks_the_reader_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[dict[str, Any]] = []

    def broken(url: str, *_: Any) -> dict[str, Any]:
        raise OSError(28, "full") if "full" in url else LookupError("a bug")

    def parse(url: str) -> SiteSpider:
        spider = SiteSpider.__new__(SiteSpider)
        spider.name, spider._config, spider.error, spider._ready = "site", {"agent": "x"}, None, asyncio.Event()
        monkeypatch.setattr(spider, "_record", recorded.append)
        meta = {"key": url, "as_found": url, "map": ""}
        spider.parse(HtmlResponse(url, body=b"<p>", request=Request(url, meta=meta)))
        return spider

    monkeypatch.setattr("pipelines.sources.site_spider.read_page", broken)
    assert parse("http://a.test/").error is None and recorded[0]["failure"] == "broken_page"
    assert isinstance(parse("http://a.test/full").error, OSError) and len(recorded) == 1


def test_an_opt_out_seen_later_buries_what_was_taken(workspace: Workspace) -> None:
    routes = {"/": '<img src="a.png" alt="a">', "/robots.txt": with_headers(b"", {}, 404)}
    with small_web(routes) as site:
        assert crawl(workspace, site).new == 1
        site.routes["/"] = '<meta name="robots" content="noai"><img src="a.png" alt="a"><img src="b.png" alt="b">'
        later = crawl(workspace, site)
        assert (later.increment, later.new, later.opt_out, later.buried) == ("0001", 1, 1, 1)
        assert workspace.tombstones()["url_key"] == {url_key(site.url("/a.png"))}


def test_a_limited_crawl_takes_the_first_pages_by_level_and_name(workspace: Workspace) -> None:
    with small_web(small_site()) as site:
        counts = crawl(workspace, site, max_pages=4)
        assert sorted(set(site.asked)) == [
            "/",
            "/.well-known/tdmrep.json",
            "/moved",
            "/page0.html",
            "/page1.html",
            "/robots.txt",
        ]
    assert sum(counts.pages.values()) == 4


def test_an_unreachable_site_is_an_error_and_leaves_nothing(workspace: Workspace) -> None:
    with small_web({}) as site:
        pass
    with pytest.raises(PairmillError, match="1 × robots_connect"):
        crawl(workspace, site)
    with small_web(small_site()) as site, pytest.raises(PairmillError, match="1 × address"):
        crawl(workspace, site, allow=[])
    assert workspace.store.files("candidates") == workspace.store.files("crawl") == []


KILLED = """
import sys
from pairs.recipe import FetchSpec, SourceSpec
from pairs.tar import TarWriter
from pairs.workspace import Workspace
from pipelines.candidates import cut_increment
workspace = Workspace.open(sys.argv[1])
spec = SourceSpec(kind="site", seeds=[sys.argv[2]], allow=["127.0.0.0/8"], delay_s=0.0, per_host=1)
cut_increment(workspace, "src", spec, FetchSpec(deadline_s=5, attempts=1), lambda *a: None)
"""


@pytest.mark.slow
def test_a_killed_crawl_goes_on_where_it_was(workspace: Workspace, tmp_path: Path) -> None:
    with small_web(small_site(40)) as site:
        whole = Workspace.open(tmp_path / "whole", create=True)
        crawl(whole, site, per_host=1)
        expected = whole.store.read(part("src", "0000"))
        site.asked.clear()
        command = [sys.executable, "-c", KILLED, str(workspace.store.root), site.url("/")]
        child = subprocess.Popen(command, cwd=ROOT)
        pages = Path(workspace.store.root) / "crawl/src/0000/pages.jsonl"
        until = time.monotonic() + 40
        while not (pages.exists() and pages.read_bytes().count(b"\n") > 10):
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(0.3)  # the crawler dies with its parent
        recorded = pages.read_bytes()
        assert recorded.count(b"\n") < 42 and workspace.store.files("candidates") == []
        with pages.open("ab") as file:
            file.write(b'{"url": "torn')
        first = list(site.asked)
        crawl(workspace, site, per_host=1)
        again = site.asked[len(first) :]
    done = {json.loads(line).get("url") for line in recorded.splitlines()[1:]}
    assert not {site.url(path) for path in again} & done
    assert workspace.store.read(part("src", "0000")) == expected


def sitemap(*pages: str, kind: str = "url") -> bytes:
    entries = "".join(f"<{kind}><loc> {page} </loc><lastmod>2026</lastmod></{kind}>" for page in pages)
    return f'<x xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</x>'.encode()


def test_sitemaps_name_pages_that_no_link_leads_to(workspace: Workspace) -> None:
    routes: dict[str, Any] = {"/": '<img src="0.png" alt="zero">', "/moved.xml": redirect("/own.xml")}
    routes |= {f"/{n}.html": f'<img src="{n}.png" alt="{n}">' for n in (1, 2, 3)}
    with small_web(routes) as site:
        robots = f"User-agent: *\nSitemap: {site.url('/index.xml')}\n"
        entity = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x><url><loc>&a;</loc></url></x>'
        routes["/robots.txt"] = with_headers(robots.encode(), {})
        parts = [site.url(path) for path in ("/part.xml.gz", "/bad.xml", "/none.xml")]
        routes["/index.xml"] = with_headers(sitemap(*parts, kind="sitemap"), {})
        page = site.url("/1.html"), "http://elsewhere.test/", site.url("/gone.html")
        routes["/part.xml.gz"] = with_headers(gzip.compress(sitemap(*page)), {"Content-Type": "application/gzip"})
        routes["/bad.xml"] = with_headers(entity, {})
        routes["/own.xml"] = with_headers(sitemap(site.url("/2.html")), {})
        counts = crawl(workspace, site, sitemaps=[site.url("/moved.xml")])
        assert len(site.asked) == len(set(site.asked)) and "/3.html" not in site.asked
    assert counts.new == 3
    assert counts.pages == {
        **{"ok": 3, "http_404": 1, "sitemap_ok": 3, "sitemap_damaged": 1},
        **{"sitemap_http_404": 1, "sitemap_redirected": 1},
    }


def test_sitemaps_that_are_left_are_counted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """robots.txt may name them on other hosts, others may not; those beyond the limit are in `cut`."""
    monkeypatch.setattr("pipelines.sources.site.child", crawler(FEW_SITEMAPS))
    with small_web({}, "127.0.0.2") as other, small_web({"/": '<img src="0.png" alt="zero">'}) as site:
        site.routes |= {f"/{n}.html": f'<img src="{n}.png" alt="{n}">' for n in (1, 2, 3)}
        site.routes["/robots.txt"] = with_headers(f"Sitemap: {other.url('/index.xml')}\nSitemap: s.xml".encode(), {})
        parts = [other.url("/1.xml"), site.url("/2.xml"), "http://elsewhere.test/s.xml", other.url("/3.xml")]
        other.routes["/index.xml"] = with_headers(sitemap(*parts, kind="sitemap"), {})
        other.routes["/1.xml"] = with_headers(sitemap(site.url("/1.html"), other.url("/no.html")), {})
        other.routes["/3.xml"] = with_headers(sitemap(site.url("/3.html")), {})
        site.routes["/2.xml"] = with_headers(sitemap(site.url("/2.html")), {})
        counts = crawl(workspace, site)
        assert counts.pages == {"ok": 3, "sitemap_ok": 3}
        assert counts.pages_cut == 2, "robots.txt, whose second is no address, and the index, of which two are left"
        assert "/3.html" not in site.asked and not {"/no.html", "/3.xml"} & set(other.asked)


def test_a_sitemap_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.site_sitemap.MAX_ENTRIES", 2)
    found = read_sitemap(sitemap("http://a.test/1", "http://a.test/2", "http://a.test/3"))
    assert (len(found["links"]), found["cut"], found["failure"]) == (2, 1, None)
    monkeypatch.setattr("pipelines.sources.site_sitemap.MAX_BYTES", 300_000)
    assert read_sitemap(gzip.compress(b" " * 1_000_000))["failure"] == "too_large"
    long = read_sitemap(gzip.compress(sitemap("http://a.test/1")[:-4] + b" " * 1_000_000 + b"</x>"))
    assert (long["links"], long["failure"]) == (["http://a.test/1"], "too_large"), "what came before is kept"
    assert read_sitemap(b"<x><url>")["failure"] == "damaged" and read_sitemap(b"")["failure"] == "damaged"


@pytest.mark.parametrize(
    "body",
    [
        b"<x>" + b"".join(b"<a%d/>" % n for n in range(2000)),
        b"<x " + b" ".join(b'a%d=""' % n for n in range(2000)) + b"/>",
        b"<a>" * 1000,
        b"<x><!--" + b"a" * 2_000_000 + b"--></x>",
        b"<x>" + b"<a/>" * 1_000_001 + b"</x>",
    ],
    ids=["names", "attributes", "depth", "one token", "elements"],
)
def test_a_sitemap_made_to_cost_much_is_left(body: bytes) -> None:
    assert read_sitemap(body) == {"links": [], "more": [], "cut": 0, "failure": "too_large"}


def test_a_sitemap_has_limits_of_its_own(workspace: Workspace) -> None:
    with small_web({"/": '<img src="0.png" alt="zero">'}) as site:
        site.routes["/1.html"] = '<img src="1.png" alt="one">'
        whole = sitemap(*[site.url(f"/1.html?{'x' * 300}")] * 20, site.url("/1.html"))
        site.routes["/s.xml"] = with_headers(whole, {})
        counts = crawl(workspace, site, sitemaps=[site.url("/s.xml")], max_page_bytes=3000)
    assert len(whole) > 3000 and counts.new == 2 and counts.pages == {"ok": 3, "sitemap_ok": 1}


def image_of(markup: str) -> dict[str, Any]:
    return dict(page(markup)["images"][0])


@pytest.mark.parametrize(
    ("markup", "address"),
    [
        ('<img src="a.png" srcset="b.png 100w, c.png 900w, d.png 300w">', "c.png"),
        ('<img src="a.png" srcset="b.png, c.png 2x,d.png 1.5x">', "c.png"),
        ('<img src="a.png" srcset="b,1.png 100w,c,2.png 200w">', "c,2.png"),
        ('<img src="a.png" srcset="data:image/gif;base64,AA 900w" data-srcset="b.png 1x, c.png 3x">', "c.png"),
        ('<img src="pixel.gif" data-src="b.png">', "b.png"),
        ('<img src="pixel.gif" data-original=" b.png ">', "b.png"),
        ('<img src="data:image/gif;base64,AA" data-lazy-src="b.png">', "b.png"),
        (
            '<picture><source type="image/avif" srcset="b.avif 900w"><source srcset="c.webp 800w"><img src=a.png>',
            "c.webp",
        ),
        ('<picture><source srcset="c.webp 800w"><img src=a.png srcset="d.png 900w"></picture>', "d.png"),
        ('<picture><source srcset="c.webp 2x"></picture><img src="a.png">', "a.png"),
        ('<img src="a.png" srcset=", ,">', "a.png"),
        ('<img src="a.png" srcset="b.png nonsense">', "b.png"),
    ],
)
def test_the_largest_address_of_an_image_is_taken(markup: str, address: str) -> None:
    assert image_of(markup)["url"] == f"http://a.test/x/{address}"


def test_open_graph() -> None:
    found = page(
        '<html lang="fr"><title>T</title><meta property="og:title" content="Mot">'
        '<meta property="og:image" content="1.png">'
        '<meta property="og:image:alt" content="un"><meta name="og:image" content="2.png">'
        '<meta property="og:description" content="Dit">'
    )
    told = {row["url"][-5:]: [(t["text"], t["kind"], t["language"]) for t in row["texts"]] for row in found["images"]}
    own = [("Mot", "og", "fr"), ("Dit", "og", "fr"), ("T", "title", "fr")]
    assert told == {"1.png": [("un", "og", "fr"), *own], "2.png": own}
    assert {row["found"] for row in found["images"]} == {"og"}


@pytest.mark.parametrize(
    ("markup", "licence"),
    [
        ('<img src=a.png><a href="http://creativecommons.org/licenses/by/4.0/">by</a>', "by/4.0/"),
        (
            '<a href="http://creativecommons.org/licenses/by/4.0/">by</a><link rel=license href=own><img src=a.png>',
            "own",
        ),
        ("<link rel=license href=own><figure><img src=a.png><a rel=license href=its>l</a></figure>", "its"),
        ("<figure><a rel=license href=its>l</a></figure><img src=a.png>", None),
    ],
)
def test_the_licence_of_an_image(markup: str, licence: str | None) -> None:
    named = image_of(markup)["license"]
    assert (named or "").endswith(licence or "") and bool(named) == bool(licence)


def test_words_of_a_caption_are_joined_as_they_are_seen() -> None:
    found = image_of(
        "<figure><img src=a.png><figcaption>o<b>n</b>e<br>two<p>three</p><script>x()</script><!-- no --></figcaption>"
    )
    assert " ".join(found["texts"][0]["text"].split()) == "one two three"


def test_texts_are_cut_where_they_are_long_and_not_where_they_are_wide(workspace: Workspace) -> None:
    wide, long = "a" + " \n" * 30_000 + "b", "x " * 6_000
    found = f'<img src=1.png alt="{wide}"><figure><img src=2.png alt="z{long}"><figcaption>{long}</figcaption></figure>'
    with small_web({"/": found}) as site:
        assert crawl(workspace, site).texts_cut == 2
    rows = {row["url"][-5:]: row["texts"] for row in workspace.store.read_table(part("src", "0000")).to_pylist()}
    assert [t["text"] for t in rows["1.png"]] == ["a b"] and [len(t["text"]) for t in rows["2.png"]] == [10_000] * 2


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe<\x00p\x00",
        b"",
        b"\x00" * 100,
        "<p>ä".encode("utf-16"),
        b"<" * 5000,
        b"<!doctype html>",
        b"<!-- x -->",
    ],
)
def test_any_bytes_are_a_page(content: bytes) -> None:
    assert read_page("http://a.test/", content, [("content-type", "text/html; charset=nonsense")], "x")["images"] == []


def test_layouts_of_laion_and_datacomp_are_known(workspace: Workspace, tmp_path: Path) -> None:
    laion = {"SAMPLE_ID": [7], "URL": ["http://a.test/l"], "TEXT": ["one"], "LICENSE": ["?"], "NSFW": ["UNLIKELY"]}
    datacomp = {"uid": ["ab"], "url": ["http://a.test/d"], "text": ["two"], "original_width": [3], "sha256": ["x"]}
    pq.write_table(pa.table(laion), tmp_path / "1.parquet")
    pq.write_table(pa.table(datacomp), tmp_path / "2.parquet")
    rows = rows_of(workspace, kind="urls", path=str(tmp_path / "*.parquet"))
    found = {row["url"][-1]: (row["texts"][0]["text"], row["source_uid"], row["license"]) for row in rows}
    assert found == {"l": ("one", "7", None), "d": ("two", "ab", None)}


COCO = {
    "images": [{"id": 5, "file_name": "b.jpg", "license": 1}, {"id": 6, "file_name": "absent.jpg"}],
    "annotations": [{"id": 2, "image_id": 5, "caption": "second"}, {"id": 1, "image_id": 5, "caption": "first"}],
    "licenses": [{"id": 1, "url": "http://l.test/by"}],
}


def test_captions_of_coco(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "in/annotations").mkdir(parents=True)
    (tmp_path / "in/b.jpg").write_bytes(picture(kind="JPEG"))
    (tmp_path / "in/annotations/captions_val.json").write_text(json.dumps(COCO))
    settings = {"kind": "folder", "path": str(tmp_path / "in"), "captions": "annotations/captions_*.json"}
    [row] = rows_of(workspace, **settings)
    assert [t["text"] for t in row["texts"]] == ["first", "second"]
    assert (row["source_uid"], row["license"]) == ("5", "http://l.test/by")
    (tmp_path / "in/annotations/captions_val.json").write_text('{"images": []}')
    with pytest.raises(PairmillError, match="captions"):
        rows_of(Workspace.open(tmp_path / "other", create=True), **settings)
    with pytest.raises(PairmillError, match="none of"):
        rows_of(Workspace.open(tmp_path / "third", create=True), **settings | {"captions": "/etc/*.json"})


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with path.open("wb") as file:
        tar = TarWriter(file)
        for name, data in members.items():
            tar.add(*name.split(".", 1), data)
        tar.close()


def test_webdataset(workspace: Workspace, tmp_path: Path) -> None:
    facts = {"uid": "ab", "caption": "words", "license": "cc0"}
    pair = {"p1.jpg": picture(kind="JPEG"), "p1.txt": b"words\nmore", "p1.json": json.dumps(facts).encode()}
    make_tar(tmp_path / "0.tar", pair | {"p2.png": picture(), "p2.json": b"{", "p3.txt": b"no image"})
    settings = {"kind": "webdataset", "path": str(tmp_path / "*.tar")}
    counts = cut_increment(workspace, "src", spec(**settings), FetchSpec(), quiet)
    assert (counts.found, counts.new, counts.dropped) == (3, 2, {"no_image": 1})
    rows = {row["url"]: row for row in workspace.store.read_table(part("src", "0000")).to_pylist()}
    one, two = rows["src:0.tar/p1.jpg"], rows["src:0.tar/p2.png"]
    assert [t["text"] for t in one["texts"]] == ["words", "more"] and one["license"] == "cc0"
    assert (one["source_uid"], two["source_uid"], two["texts"]) == ("ab", "p2", [])
    fetched = fetch_increment(workspace, "src", spec(**settings), FetchSpec(), "0000", quiet)
    assert fetched.ok == 2
    source = load_source("src", spec(**settings))
    assert source.read("0.tar/p2.png", 4) == picture()[:5]  # type: ignore[attr-defined]
    for outside in ("../0.tar/p2.png", "0.tar/p4.png", "1.tar/p2.png", "0.tar/../p2.png"):
        with pytest.raises(Outside):
            source.read(outside, 4)  # type: ignore[attr-defined]


def test_a_tar_s_pairs_keep_their_addresses_and_the_texts_of_our_own_shards(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"text": "zwei Worte", "kind": "alt", "language": "de"}, {"text": "title", "kind": "title"}]
    images = {n: picture(("red", "blue", "lime", "black")[n]) for n in range(4)}
    for n, image in images.items():
        facts = (
            {"url": f"{'HTTP' if n == 1 else 'http'}://h{n}.test/A%20b.png#x", "texts": texts}
            if n != 3
            else {"url": "src:x/3.png"}
        )
        pair = {f"p{n}.png": image, f"p{n}.txt": b"title", f"p{n}.json": json.dumps(facts).encode()}
        make_tar(tmp_path / f"{n}.tar", pair)
    settings = {"kind": "webdataset", "path": str(tmp_path / "*.tar")}
    rows = {row["url"]: row for row in rows_of(workspace, **settings)}
    names = {f"{'HTTP' if n == 1 else 'http'}://h{n}.test/A%20b.png" for n in range(3)}
    assert rows.keys() == names | {"src:3.tar/p3.png"}
    assert rows["http://h0.test/A%20b.png"]["url_key"] == url_key("http://h0.test/A%20b.png")
    assert rows["http://h0.test/A%20b.png"]["texts"] == [texts[0], texts[1] | {"language": None}]
    forget(workspace, {"hosts": ["h2.test"]}, "", lambda _: None)
    counts = fetch_increment(workspace, "src", spec(**settings), FetchSpec(), "0000", quiet)
    assert counts.ok == 3 and counts.failed == {"refused/forgotten": 1}
    source, whole, read = load_source("src", spec(**settings)), [], webdataset.read_members
    monkeypatch.setattr(webdataset, "read_members", lambda data, name: whole.append(name) or read(data, name))
    for n in (0, 1, 0, 1, 2, 0):
        address = f"http://h{n}.test/A%20b.png" if n else f"{n}.tar/p{n}.png"
        assert source.read(address, 10**6) == images[n]  # type: ignore[attr-defined]
    assert sorted(whole) == ["0.tar", "1.tar", "2.tar"], "no tar is read twice"
    with pytest.raises(Outside):
        source.read("http://other.test/", 4)  # type: ignore[attr-defined]


def test_of_a_tar_the_images_are_not_read_for_its_candidates(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bytes(range(256)) * 80_000
    facts = {"url": "http://a.test/1.png"}
    pairs = {f"p{n}.{ext}": data for n in range(3) for ext, data in {"png": image, "txt": b"words"}.items()}
    make_tar(tmp_path / "0.tar", {**pairs, "q.json": json.dumps(facts).encode(), "q.png": image[1:]})
    read, opened = [], LocalFileOpener.read

    def counted(file: LocalFileOpener, size: int = -1) -> bytes:
        data = opened(file, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(LocalFileOpener, "read", counted, raising=False)
    rows = rows_of(workspace, kind="webdataset", path=str(tmp_path / "0.tar"))
    assert [[t["text"] for t in row["texts"]] for row in rows].count(["words"]) == 3 and len(rows) == 4
    assert 0 < sum(read) < 100_000
    source, read[:] = load_source("src", spec(kind="webdataset", path=str(tmp_path / "0.tar"))), []
    assert source.read("http://a.test/1.png", 1 << 30) == image[1:]  # type: ignore[attr-defined]
    assert sum(read) < 100_000 + len(image)


def test_a_text_of_a_tar_is_bounded(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 9)
    make_tar(tmp_path / "0.tar", {"p.png": picture(), "p.txt": b"ten  bytes"})
    with pytest.raises(PairmillError, match=r"0\.tar\s+found p\.txt"):
        rows_of(workspace, kind="webdataset", path=str(tmp_path / "0.tar"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE])
def test_a_tar_that_reaches_out_is_refused(kind: bytes, workspace: Workspace, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("../a.jpg" if kind == tarfile.REGTYPE else "a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(PairmillError, match=r"0\.tar"):
        rows_of(workspace, kind="webdataset", path=str(tmp_path / "0.tar"))
