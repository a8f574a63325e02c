"""What a site forbids and asks for is kept: reservations, dates, pace, a contact; its policy files hold for a day."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from pairs.errors import PairmillError
from pairs.recipe import FetchSpec, SourceSpec
from pairs.store import Store
from pairs.workspace import KINDS, Dead, Workspace
from pipelines.candidates import cut_increment
from pipelines.fetch import policies
from pipelines.fetch.blocklists import Blocklists
from pipelines.fetch.client import (
    Answer,
    Client,
    Limits,
    any_headers,
    any_url,
    open_client,
    require_contact,
)
from pipelines.fetch.failures import Failure
from pipelines.fetch.guard import networks
from pipelines.fetch.policies import Bounded, Policies, load_policies, save_policies
from pipelines.fetch.robots import Robots, _matches, opt_out, opted_out
from pipelines.sources.site_cache import load_unchanging, save_unchanging, unchanged
from tests.pipelines.small_web import ALLOW, redirect, small_web, with_headers

AGENT = "pairmill/1 (+mailto:test@localhost)"
NONE: Dead = dict.fromkeys(KINDS, frozenset())
LIMITS = Limits(deadline_s=5.0, attempts=1)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = open_client(AGENT, 4, 16, networks(ALLOW, "test"))
    yield made
    await made.session.close()


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", "unavailable_after"),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 EST", "unavailable_after"),
        ("unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai", "noai"),
        ("pairmill: unavailable_after: 2010-06-25", "unavailable_after"),
        ("otherbot: unavailable_after: 2010-06-25", None),
        ("unavailable_after: 2990-06-25T15:00:00+00:00", None),
        ("unavailable_after: Mon, 25-Jun-60 15:00:00 GMT", None),
        ("unavailable_after: who knows when", "unavailable_after"),
        ("unavailable_after: Mon 01 Jan 99999999999999999999 00:00:00 GMT", "unavailable_after"),
        ("unavailable_after: 2990-01-01, noml", "noml"),
    ],
)
def test_unavailable_after_holds_once_its_date_has_passed(value: str, word: str | None) -> None:
    assert opt_out([value], AGENT) == word


def test_a_reservation_in_the_header() -> None:
    assert opted_out({"TDM-Reservation": "1"}, [], AGENT) == "tdm"
    assert opted_out({"TDM-Reservation": "0"}, [], AGENT) is None


@pytest.mark.parametrize(
    ("path", "pattern", "holds"),
    [
        *(("/a/b.png", "/a/", True), ("/a/b.png", "/b/", False), ("/a/b.png", "*.png", True)),
        *(("/a/b.png?x", "*.png$", False), ("/a/b.png", "/*.png$", True), ("/a", "/a$", True), ("/ab", "/a$", False)),
        *(("/", "/", True), ("/aa", "/a*a$", True), ("/a", "/a*a$", False), ("/x", "*", True)),
        *(("/foo-$", "/foo-%24", True), ("/foo-$/x", "/foo-%24$", False), ("/~me/%C3%A4", "/%7eme/ä", True)),
        *(("/a%2fb", "/a%2F", True), ("/a/b", "/a%2Fb", False), ("/A", "/a", False), ("/*", "/%2A$", True)),
        ("/" + "a" * 5000, "*a" * 500 + "b", False),
    ],
)
def test_paths_of_tdmrep(path: str, pattern: str, holds: bool) -> None:
    began = time.monotonic()
    assert _matches(path, pattern) is holds
    assert time.monotonic() - began < 0.5


def rules(*told: tuple[str, object]) -> str:
    """A tdmrep.json of locations and their reservations."""
    return json.dumps([{"location": at, "tdm-reservation": value, "tdm-policy": "http://p/"} for at, value in told])


@pytest.mark.parametrize(
    ("reserved", "path", "verdict"),
    [
        ('[{"location": "/art/", "tdm-reservation": 1}]', "/art/a.png", Failure("refused", "tdm")),
        ('[{"location": "/art/", "tdm-reservation": 1}]', "/free/a.png", None),
        ('[{"location": "/", "tdm-reservation": 0}]', "/a.png", None),
        (rules(("/art/free/*.png", 0), ("/art/", 1)), "/art/free/a.png", None),
        (rules(("/art/free/*.png", 0), ("/art/", 1)), "/art/free/a.jpg", Failure("refused", "tdm")),
        (rules(("/art/", 1), ("/art/free/", 0)), "/art/free/a.png", Failure("refused", "tdm")),
        (rules(("/art/", 2), ("/art/", 1)), "/art/a.png", Failure("refused", "tdm")),
        (rules(("/art/", [1]), ("/\ud800", 1)), "/art/a.png", None),
        ('{"location": "/", "tdm-reservation": 1}', "/a.png", None),
        ("<html>not found", "/a.png", None),
        ("[" * 90_000, "/a.png", None),
        (with_headers(b"", {}, 503), "/a.png", None),
    ],
)
async def test_a_reservation_by_origin(client: Client, reserved: object, path: str, verdict: Failure | None) -> None:
    robots = Robots(client)
    with small_web({"/.well-known/tdmrep.json": reserved}) as site:  # type: ignore[dict-item]
        answers = [await robots.permit(URL(site.url(path))) for _ in range(2)]
        assert site.asked.count("/robots.txt") == 1
    assert answers == [verdict, verdict]


@pytest.mark.parametrize("way", ["/robots.txt", "/.well-known/tdmrep.json"])
async def test_policy_files_lead_to_no_host_that_is_blocked_or_forgotten(client: Client, way: str) -> None:
    with small_web({}, "127.0.0.2") as barred, small_web({way: redirect(barred.url("/"))}) as site:
        for bar, reason in (
            (Blocklists(frozenset({"127.0.0.2"})).bar(NONE), "block_host"),
            (Blocklists(frozenset()).bar({**NONE, "host": {"127.0.0.2"}}), "forgotten"),
        ):
            robots = Robots(client, bar=bar)
            expected = None if "tdm" in way else Failure("refused", reason)  # who can't tell reserves nothing
            assert await robots.permit(URL(site.url("/a"))) == expected and site.asked.pop() == way
            assert await robots.permit(URL(barred.url("/a"))) == Failure("refused", reason)
            assert await robots.sitemaps(URL(barred.url("/a"))) == []
        assert barred.asked == []


async def test_policy_files_are_kept_a_day_across_runs(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    with small_web({"/robots.txt": with_headers(b"User-agent: *\nDisallow: /x", {})}) as site:
        url = URL(site.url("/x"))
        kept = load_policies(store)
        assert await Robots(client, kept).permit(url) == Failure("refused", "robots")
        save_policies(store, kept)
        site.asked.clear()
        assert await Robots(client, load_policies(store)).permit(url) == Failure("refused", "robots")
        assert site.asked == []
        monkeypatch.setattr(policies, "KEPT_S", -1.0)
        assert await Robots(client, load_policies(store)).permit(url) == Failure("refused", "robots")
        assert site.asked == ["/robots.txt"]
    store.write(policies.PATH, b"damaged")
    assert load_policies(store) == Policies()


async def test_only_an_answer_that_there_is_no_file_allows_everything(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [("no_such_host", None), ("bad_response", None), ("http_300", 300)]
    given = [Failure("permanent", *failure) for failure in [*failures, ("http_410", 410)]]
    asked: list[str] = []

    async def fetch(url: str, *_: object) -> Answer:
        asked.append(url)
        return Answer(given[len(asked) - 1], 1)

    monkeypatch.setattr(client, "fetch", fetch)
    known, url = Policies(), "http://a.test/robots.txt"
    for number, (reason, code) in enumerate(failures, 1):
        monkeypatch.setattr(policies, "RETRY_S", 300.0 if number == 1 else -1.0)
        assert await known.get(client, url) == Failure("transient", reason, code) and len(asked) == number
        monkeypatch.setattr(policies, "RETRY_S", 300.0)
        assert await known.get(client, url) == Failure("transient", reason, code) and len(asked) == number
    monkeypatch.setattr(policies, "RETRY_S", -1.0)
    assert await known.get(client, url) == "" and set(known.known.kept) == {url}


async def test_policy_files_of_many_origins_are_held_and_parsed_within_bounds(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest text and the parse that was used longest ago go first; what went is had again."""
    size, kept = 200_000, Policies()
    monkeypatch.setattr(policies, "_parsed", Bounded(3 * size))
    kept.known.limit = 3 * size
    bodies = [f"User-agent: *\nDisallow: /x{n}\n".ljust(size - 10_000, "#").encode() for n in range(5)]
    tdm: dict[str, Any] = {"/.well-known/tdmrep.json": b"[]"}
    with ExitStack() as stack:
        sites = [
            stack.enter_context(small_web(tdm | {"/robots.txt": body}, f"127.0.0.{n + 2}"))
            for n, body in enumerate(bodies)
        ]
        robots = Robots(client, kept)
        for n, site in enumerate([*sites, sites[0]]):
            assert await robots.permit(URL(site.url(f"/x{n % 5}"))) == Failure("refused", "robots")
            assert await robots.permit(URL(site.url("/y"))) is None
        assert [site.asked.count("/robots.txt") for site in sites] == [2, 1, 1, 1, 1]
        for held in (kept.known, policies._parsed):
            assert size < held.weight <= 3 * size and held.weight == sum(weight for weight, _ in held.kept.values())
        assert not any(isinstance(text, str) and len(text) > size // 2 for text in map(_told, kept._asked.values()))
        save_policies(Store(tmp_path), kept)
        again = load_policies(Store(tmp_path)).known
        assert again.kept == kept.known.kept and again.weight == kept.known.weight
    parsed = [robots_text for (_, robots_text) in policies._parsed.kept if len(robots_text) > 99]
    assert [text[25:27] for text in parsed] == ["x3", "x4", "x0"]


def _told(asked: "tuple[float, asyncio.Task[str | Failure]]") -> object:
    return asked[1].result()


async def test_a_host_is_asked_no_faster_than_its_crawl_delay(client: Client) -> None:
    rules = with_headers(b"User-agent: *\nCrawl-delay: 0.2", {})
    with small_web({"/robots.txt": rules, "/a": with_headers(b"x", {})}) as site:
        robots, when = Robots(client), []

        async def one() -> None:
            await client.fetch(site.url("/a"), LIMITS, robots.permit, any_headers)
            when.append(time.monotonic())

        await asyncio.gather(*(one() for _ in range(4)))
    assert max(when) - min(when) > 0.5
    slow = with_headers(b"User-agent: *\nCrawl-delay: 900", {})
    with small_web({"/robots.txt": slow}) as site:
        assert await Robots(client).permit(URL(site.url("/a"))) == Failure("refused", "crawl_delay")


async def test_retry_after_rests_the_whole_host(client: Client) -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "60"})

    with small_web({"/a": busy, "/b": with_headers(b"x", {})}) as site:
        first = await client.fetch(site.url("/a"), LIMITS, any_url, any_headers)
        other = await client.fetch(site.url("/b"), LIMITS, any_url, any_headers)
        assert site.asked == ["/a"]
    assert isinstance(first.result, Failure) and first.result.reason == "http_429"
    assert isinstance(other.result, Failure) and other.result[:2] == ("transient", "host_rests")


async def test_without_a_contact_only_loopback_is_asked() -> None:
    require_contact("pairmill", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
    require_contact(AGENT, ["a.test"])
    require_contact("pairmill (+https://a.test/bot)", ["a.test"])
    for host in ("a.test", "10.0.0.1", "localhost.a.test"):
        with pytest.raises(PairmillError, match=r"contact in fetch\.agent"):
            require_contact("pairmill/1 (+see our page)", [host])
    client = open_client("pairmill", 4, 16, ())
    answer = await client.fetch("http://a.test/", LIMITS, any_url, any_headers)
    await client.session.close()
    assert answer.result == Failure("transient", "no_contact") and client.requests == 0


def record(**more: object) -> dict[str, object]:
    fields: dict[str, object] = {"key": "http://a.test/", "url": "http://a.test/", "links": ["http://b.test/"]}
    images = [{"url": "http://b.test/1.png"}, {"url": "http://a.test/2.png"}]
    return fields | {"images": images, "opt_out": None, "failure": None, "redirect": None, "cut": 0} | more


def test_an_unchanged_page_heeds_what_its_headers_bring() -> None:
    before = record(ETag='"1"')
    assert unchanged(before, [("ETag", '"2"')], AGENT) == before | {"ETag": '"2"'}
    assert unchanged(before, [], AGENT) == before
    closed = unchanged(before, [("X-Robots-Tag", "nofollow")], AGENT)
    assert closed["links"] == [] and "ETag" not in closed
    dated = unchanged(before, [("X-Robots-Tag", "unavailable_after: 2990-01-01")], AGENT)
    assert "ETag" not in dated and dated["opt_out"] is None


def test_only_pages_that_a_crawl_met_are_kept_and_nothing_forgotten(tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "w", create=True)
    config = {"pages": str(tmp_path / "w/crawl/web/0000/pages.jsonl"), "agent": AGENT}

    def save(*pages: dict[str, object]) -> dict[str, dict[str, object]]:
        space.store.write("crawl/web/0000/pages.jsonl", "".join(json.dumps(p) + "\n" for p in pages))
        save_unchanging(config)
        return load_unchanging(config)

    assert save(record(ETag="1"), record(key="http://a.test/x", url="http://a.test/x")).keys() == {"http://a.test/"}
    assert save(record(ETag="1", failure="deadline")).keys() == {"http://a.test/"}, "a crawl that met none"
    space.bury("host", ["b.test"], "asked for")
    page = save(record(ETag="1"), record(ETag="1", key="http://b.test/", url="http://b.test/"))
    assert page.keys() == {"http://a.test/"} and page["http://a.test/"]["links"] == []
    assert page["http://a.test/"]["images"] == [{"url": "http://a.test/2.png"}]


def test_a_page_with_a_date_is_asked_for_whole_again(tmp_path: Path) -> None:
    workspace, asked = Workspace.open(tmp_path / "work", create=True), []

    async def page(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("If-None-Match"))
        body = "<meta name=robots content='unavailable_after: 2990-01-01'><img src=a.png alt=a>"
        return web.Response(text=body, content_type="text/html", headers={"ETag": '"1"'})

    with small_web({"/": page}) as site:
        settings = {"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, "delay_s": 0.0}
        for _ in range(2):
            cut_increment(workspace, "web", SourceSpec.model_validate(settings), FetchSpec(), lambda *_: None)
    assert asked == [None, None]


PAGE = "<title>t</title><img src='/a.png' alt='a picture'><a href='/other.html'>"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_page_that_is_unchanged_keeps_its_earlier_record(tmp_path: Path) -> None:
    """Three crawls: all read; one unchanged by ETag, the other changed; then the first brings a reservation."""
    state: dict[str, str] = {"body": PAGE, "etag": '"1"'}
    seen: list[tuple[str, str | None]] = []

    def page(name: str) -> object:
        async def answer(request: web.Request) -> web.StreamResponse:
            asked = request.headers.get("If-None-Match")
            seen.append((name, asked))
            headers = {"ETag": state["etag"] if name == "/" else state.get("other", '"o"')}
            headers |= {"TDM-Reservation": "1"} if "reserved" in state else {}
            if asked == headers["ETag"]:
                return web.Response(status=304, headers=headers)
            body = state["body"] if name == "/" else f"<img src='/{state.get('image', 'b')}.png' alt='b'>"
            return web.Response(text=body, content_type="text/html", headers=headers)

        return answer

    workspace = Workspace.open(tmp_path / "work", create=True)
    with small_web({"/": page("/"), "/other.html": page("/other.html")}) as site:  # type: ignore[dict-item]

        def crawl() -> tuple[int, int]:
            settings = {"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, "delay_s": 0.0}
            spec = SourceSpec.model_validate(settings)
            counts = cut_increment(workspace, "web", spec, FetchSpec(), lambda *_: None)
            return counts.new, counts.buried

        assert crawl() == (2, 0)
        state |= {"other": '"p"', "image": "c"}
        seen.clear()
        assert crawl() == (1, 0) and seen == [("/", '"1"'), ("/other.html", '"o"')]
        assert crawl() == (0, 0)
        state["reserved"] = "yes"
        assert crawl() == (0, 2)
