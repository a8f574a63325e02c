"""Hostile URLs and servers (`hostile.py`): each is refused or bounded in time and memory, with its reason.

Nothing but loopback is contacted: names are resolved by a resolver of the test, and what lies elsewhere is refused
before a socket exists.
"""

import gzip
import socket
from typing import Any

import pytest

from pipelines.fetch.client import Response, any_headers, any_url, open_client
from pipelines.fetch.failures import Failure
from pipelines.fetch.guard import networks
from tests.pipelines.hostile import AGENT, LIMITS, SERVERS, URLS, body, cost, raw_server, redirect, sends
from tests.pipelines.small_web import picture
from tests.pipelines.test_fetch import png_bomb
from tests.pipelines.test_guard import Changing

SLACK_S = 2.0  # for a machine that does other things too
FETCH_BYTES, DECODER_BYTES = 16 << 20, 32 << 20  # the bombs would take 50 to 900 MB


def test_there_are_enough_cases() -> None:
    assert len(URLS) + len(SERVERS) >= 30 and len(SERVERS) >= 15, "each server is reached, see below"


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


@pytest.mark.parametrize("name", SERVERS)
def test_a_hostile_server_is_refused_or_bounded(name: str) -> None:
    talk, reasons = SERVERS[name]
    with raw_server(talk()) as (port, asked):
        seen = cost(port)
        assert 1 <= len(asked) <= 6, "the case reaches its socket, and asks no more than it has to"
    assert seen.outcome in reasons, seen
    assert seen.seconds < LIMITS.deadline_s + SLACK_S, seen
    assert seen.fetch_bytes < FETCH_BYTES and (seen.decoder_bytes or 0) < DECODER_BYTES, seen


def test_what_is_held_would_be_seen() -> None:
    """The bombs again, smaller and with limits that let them in."""
    with raw_server(sends(body(gzip.compress(bytes(60 << 20)), b"Content-Encoding: gzip"))) as (port, _):
        seen = cost(port, max_bytes=100 << 20)
        assert seen.fetch_bytes > 60 << 20 and (seen.decoder_bytes or 0) > 60 << 20, seen
    with raw_server(sends(body(png_bomb(6000)))) as (port, _):
        seen = cost(port, max_pixels=6000 * 6000)
        assert seen.outcome == "ok" and (seen.decoder_bytes or 0) > 2 * DECODER_BYTES > seen.fetch_bytes, seen


IMAGE = sends(body(picture(), b"Connection: close"))


async def names_that_change(
    monkeypatch: pytest.MonkeyPatch, port: int, answers: dict[str, list[list[str]]]
) -> tuple[Response | Failure, list[tuple[str, str]]]:
    """Fetches through the system's resolver, which answers each question for a name with the next of `answers`; only
    127.0.0.1 is allowed. Returns the result, and in order what was resolved and connected to."""
    log: list[tuple[str, str]] = []

    def resolve(host: str, service: int, *_: Any, **__: Any) -> list[Any]:
        log.append(("resolve", host))
        found = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, service)) for address in found]

    class Seen(socket.socket):
        def connect(self, address: Any) -> None:
            log.append(("connect", address[0]))
            super().connect(address)

    client = open_client(AGENT, 4, 16, networks(["127.0.0.1/32"], "test"))
    with monkeypatch.context() as patch:
        patch.setattr("socket.getaddrinfo", resolve)
        patch.setattr("pipelines.fetch.guard.socket.socket", Seen)
        result = (await client.fetch(f"http://a.test:{port}/", LIMITS, any_url, any_headers)).result
        await client.session.close()
    return result, log


async def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is this server's address when it is checked; whoever asked again to connect would reach another."""
    with raw_server(IMAGE) as (port, asked):
        answers = {"a.test": [["127.0.0.1"], ["127.0.0.2"]]}
        result, log = await names_that_change(monkeypatch, port, answers)
    assert isinstance(result, Response) and len(asked) == 1
    assert log == [("resolve", "a.test"), ("connect", "127.0.0.1")]


@pytest.mark.parametrize(
    ("second", "reached"),
    [
        ([["127.0.0.1"], ["169.254.169.254"]], True),
        ([["169.254.169.254"], ["127.0.0.1"]], False),
        ([["127.0.0.1", "10.0.0.1"]], False),
    ],
    ids=["good when checked", "bad when checked", "one of two bad"],
)
async def test_so_it_is_behind_a_redirect(
    second: list[list[str]], reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_server(IMAGE) as (port, asked), raw_server(sends(redirect(b"http://b.test:%d/" % port))) as (first, _):
        result, log = await names_that_change(monkeypatch, first, {"a.test": [["127.0.0.1"]], "b.test": second})
    assert isinstance(result, Response) if reached else result == Failure("refused", "address")
    there = [("resolve", "a.test"), ("connect", "127.0.0.1"), ("resolve", "b.test")]
    assert log == there + [("connect", "127.0.0.1")] * reached and len(asked) == reached


async def test_a_name_with_one_bad_address_is_not_connected_to_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(IMAGE) as (port, asked):
        for addresses in (["127.0.0.1", "192.168.0.1"], ["192.168.0.1", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]):
            result, log = await names_that_change(monkeypatch, port, {"a.test": [addresses]})
            assert result == Failure("refused", "address") and log == [("resolve", "a.test")]
    assert asked == []


async def test_a_name_that_changes_between_two_requests_is_checked_each_time() -> None:
    """First the name is this server's address, then one of a local network: no socket is made for that."""
    with raw_server(IMAGE) as (port, asked):
        resolver = Changing(["127.0.0.1"], ["192.168.0.1"])
        client = open_client(AGENT, 4, 16, networks(["127.0.0.1/32"], "test"), resolver)
        client.session.connector._use_dns_cache = False  # type: ignore[union-attr]
        first, second = [
            (await client.fetch(f"http://a.test:{port}/", LIMITS, any_url, any_headers)).result for _ in range(2)
        ]
        await client.session.close()
    assert isinstance(first, Response) and second == Failure("refused", "address") and len(asked) == 1
