"""One URL can cost no more than its limits, and what goes wrong has a class and a reason."""

import asyncio
import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from pipelines.fetch.client import (
    HELD_BYTES,
    Answer,
    Client,
    Limits,
    Response,
    _verbatim,
    any_headers,
    any_url,
    open_client,
)
from pipelines.fetch.failures import Failure, retry_after
from pipelines.fetch.guard import networks
from pipelines.fetch.robots import Robots, directives, opt_out
from tests.pipelines.small_web import ALLOW, redirect, small_web, with_headers

AGENT = "pairmill/1 (+mailto:test@localhost)"
LIMITS = Limits(deadline_s=5.0, max_bytes=100_000, attempts=1)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = open_client(AGENT, 4, 16, networks(ALLOW, "test"))
    yield made
    await made.session.close()


async def get(client: Client, url: str, limits: Limits = LIMITS) -> Answer:
    return await client.fetch(url, limits, any_url, any_headers)


async def drip(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for _ in range(100):
        await answer.write(b"x")
        await asyncio.sleep(0.1)
    return answer


async def endless(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b"x" * 65536)
    return answer


async def test_a_drip_ends_at_the_deadline(client: Client) -> None:
    with small_web({"/drip": drip}) as site:
        began = time.monotonic()
        answer = await get(client, site.url("/drip"), Limits(deadline_s=0.5, attempts=3))
        assert time.monotonic() - began < 2
    assert answer.result == Failure("transient", "deadline")
    assert answer.attempts == 1


async def test_an_endless_body_ends_at_the_cap(client: Client) -> None:
    with small_web({"/endless": endless}) as site:
        answer = await get(client, site.url("/endless"))
    assert answer.result == Failure("permanent", "too_large", 200)


async def test_a_gzip_bomb_ends_at_the_cap_in_bounded_memory(client: Client) -> None:
    bomb = gzip.compress(bytes(200_000_000))
    with small_web({"/bomb": with_headers(bomb, {"Content-Encoding": "gzip"})}) as site:
        tracemalloc.start()
        answer = await get(client, site.url("/bomb"), Limits(max_bytes=1_000_000, attempts=1))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert answer.result == Failure("permanent", "too_large", 200)
    assert peak < 100_000_000


async def test_redirects_are_followed_bounded_and_judged_anew(client: Client) -> None:
    routes = {
        "/a": redirect("/b"),
        "/b": with_headers(b"here", {}),
        "/loop": redirect("/loop"),
        "/metadata": redirect("http://169.254.169.254/latest/meta-data/"),
        "/mapped": redirect("http://[::ffff:127.0.0.1]/"),
        "/file": redirect("file:///etc/passwd"),
        "/named": redirect("http://user:pw@127.0.0.1/"),
        "/nowhere": with_headers(b"", {}, 302),
    }
    with small_web(routes) as site:
        found = {path: (await get(client, site.url(path))).result for path in routes}
        assert site.asked.count("/loop") == 6
    assert isinstance(found["/a"], Response) and found["/a"].body == b"here"
    assert found["/loop"] == Failure("permanent", "too_many_redirects")
    assert found["/metadata"] == found["/mapped"] == Failure("refused", "address")
    assert found["/file"] == Failure("refused", "scheme")
    assert found["/named"] == Failure("refused", "credentials")
    assert found["/nowhere"] == Failure("permanent", "redirect_without_location", 302)


async def test_statuses_have_classes_and_passing_ones_are_tried_again(client: Client) -> None:
    left = {"count": 2}

    async def flaky(request: web.Request) -> web.StreamResponse:
        left["count"] -= 1
        return web.Response(status=503, headers={"Retry-After": "0"}) if left["count"] else web.Response(body=b"ok")

    busy = with_headers(b"", {"Retry-After": "999"}, 429)
    routes = {"/flaky": flaky, "/gone": with_headers(b"", {}, 410), "/busy": busy}
    with small_web(routes) as site:
        flaky_answer = await get(client, site.url("/flaky"), Limits(attempts=3))
        gone = await get(client, site.url("/gone"), Limits(attempts=3))
        busy_answer = await get(client, site.url("/busy"), Limits(attempts=3, deadline_s=5))
        port = site.port
    assert isinstance(flaky_answer.result, Response) and flaky_answer.attempts == 2
    assert gone == Answer(Failure("permanent", "http_410", 410), 1)
    assert busy_answer == Answer(
        Failure("transient", "http_429", 429, 999.0), 1
    )  # its wait is longer than the deadline
    told = await get(client, f"http://127.0.0.1:{port}/")
    assert isinstance(told.result, Failure) and told.result.reason == "host_rests", "it said so for the whole host"
    client.hosts["127.0.0.1"].rests_until = 0.0
    down = await get(client, f"http://127.0.0.1:{port}/")
    assert down.result == Failure("transient", "connect")


async def test_a_host_takes_no_more_connections_than_its_turns() -> None:
    now = {"open": 0, "most": 0}

    async def slow(request: web.Request) -> web.StreamResponse:
        now["open"] += 1
        now["most"] = max(now["most"], now["open"])
        await asyncio.sleep(0.05)
        now["open"] -= 1
        return web.Response(body=b"x")

    client = open_client(AGENT, 2, 16, networks(ALLOW, "test"))
    with small_web({"/": slow}) as site:
        answers = await asyncio.gather(*(get(client, site.url("/")) for _ in range(10)))
        await client.session.close()
    assert now["most"] == 2
    assert all(isinstance(answer.result, Response) for answer in answers)


async def test_no_request_is_sent_while_too_many_bodies_wait(client: Client) -> None:
    with small_web({"/": with_headers(b"x", {})}) as site:
        client.hold(HELD_BYTES + 1)
        waiting = asyncio.create_task(get(client, site.url("/")))
        await asyncio.sleep(0.1)
        assert not site.asked and not waiting.done()
        client.hold(-2)
        assert isinstance((await waiting).result, Response)


async def test_a_host_that_never_answers_is_left_alone() -> None:
    client = open_client(AGENT, 1, 16, networks(ALLOW, "test"))
    with small_web({}) as site:
        dead = site.url("/")
    answers = [await get(client, dead) for _ in range(10)]
    await client.session.close()
    assert [answer.result.reason for answer in answers] == ["connect"] * 8 + ["host_unreachable"] * 2
    assert client.requests == 8


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        ("User-agent: *\nDisallow: /private/", Failure("refused", "robots")),
        ("User-agent: pairmill\nDisallow: /", Failure("refused", "robots")),
        ("User-agent: other\nDisallow: /", None),
        (with_headers(b"", {}, 404), None),
        (with_headers(b"", {}, 500), Failure("transient", "robots_http_500", 500)),
        (redirect("http://10.0.0.1/robots.txt"), Failure("refused", "address")),
    ],
)
async def test_robots_by_rfc_9309(client: Client, rules: object, verdict: Failure | None) -> None:
    robots = Robots(client)
    with small_web({"/robots.txt": rules}) as site:  # type: ignore[dict-item]
        answers = [await robots.permit(URL(site.url(path))) for path in ("/private/a.png", "/private/b.png")]
        assert site.asked.count("/robots.txt") <= 2  # two attempts at most, and only for the first URL
    assert answers == [verdict, verdict]


def test_opt_out_words() -> None:
    assert opt_out(["noai"], AGENT) == "noai"
    assert opt_out(["nofollow, NoImageAI"], AGENT) == "noimageai"
    assert opt_out(["otherbot: noindex, nofollow"], AGENT) is None
    assert opt_out(["pairmill: none"], AGENT) == "none"
    assert opt_out(["max-image-preview: large", "all"], AGENT) is None
    assert "nofollow" in directives(["otherbot: noindex", "nofollow"], AGENT)


def test_retry_after_takes_seconds_and_dates() -> None:
    def parse(value: str) -> float | None:
        return retry_after(CIMultiDictProxy(CIMultiDict({"Retry-After": value})))

    assert parse("7") == 7.0
    assert parse("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert parse("soon") is None and parse("Mon, 01 Jan 99999999999999999999 00:00:00 GMT") is None


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("http://A.test:80/i%2Fj/%7ex?z=%2F&a=1+2%20#top", "/i%2Fj/%7ex?z=%2F&a=1+2%20"),
        ("http://a.test?b=1", "/?b=1"),
        ("http://a.test/a b/ü?x=y z", "/a%20b/%C3%BC?x=y+z"),  # no plain text: as yarl writes it
        ("http://a.test/open/../private/x", "/private/x"),  # what robots.txt is asked about is what is sent
        ("http://a.test/open/%2e%2E/private/x", "/private/x"),
    ],
)
def test_an_address_is_sent_as_it_stood(address: str, sent: str) -> None:
    url = _verbatim(address, URL(address))
    assert url.raw_path_qs == sent and url.host == "a.test" and url.port == 80
