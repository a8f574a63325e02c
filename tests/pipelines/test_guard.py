"""The guard's decisions, and that they hold at the socket: no test here sends a packet that isn't loopback."""

import socket

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver
from yarl import URL

from pairs.errors import PairmillError
from pipelines.fetch.guard import (
    EgressRefused,
    GuardedResolver,
    guarded_connector,
    networks,
    refuse_address,
    refuse_url,
)
from tests.pipelines.small_web import ALLOW, small_web

LOCAL = networks(ALLOW, "sources.test")
FORBIDDEN = [
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.9", "203.0.113.5"),
    *("192.88.99.0", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::"),
    *("2001::1", "2001:db8::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("100::1", "3fff::1"),
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_addresses(address: str) -> None:
    assert refuse_address(address, 80) == "address"


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "172.32.0.1", "11.0.0.1"])
def test_public_addresses_on_web_ports_only(address: str) -> None:
    assert refuse_address(address, 80) is None
    assert refuse_address(address, 443) is None
    assert refuse_address(address, 22) == "port"


def test_allow_opens_its_network_and_nothing_else() -> None:
    assert refuse_address("127.0.0.12", 8765, LOCAL) is None
    for other in ("10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"):
        assert refuse_address(other, 80, LOCAL) == "address"
    with pytest.raises(PairmillError, match=r"127\.0\.0\.1/8"):
        networks(["127.0.0.1/8"], "sources.test")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.org/a.png", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("gopher://example.org/", "scheme"),
        ("http://user:pw@example.org/", "credentials"),
        ("http://user@example.org/", "credentials"),
        ("http://2130706433/", "numeric_host"),
        ("http://0177.0.0.1/", "numeric_host"),
        ("http://0x7f.0.0.1/", "numeric_host"),
        ("http://0x7f000001/", "numeric_host"),
        ("http://127.1/", "numeric_host"),
        ("http://example.org/a.png", None),
        ("http://127.0.0.1/", None),  # the address is judged at the socket
        ("http://1.example.org/", None),
    ],
)
def test_urls(url: str, reason: str | None) -> None:
    assert refuse_url(URL(url)) == reason


class Changing(AbstractResolver):
    """A name server whose answers change from one question to the next."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list:
        self.asked += 1
        found = self.answers[min(self.asked, len(self.answers)) - 1]
        return [
            {"hostname": host, "host": a, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0} for a in found
        ]

    async def close(self) -> None:
        pass


async def test_a_name_with_one_forbidden_address_is_refused() -> None:
    with pytest.raises(EgressRefused):
        await GuardedResolver((), Changing(["93.184.216.34", "10.0.0.1"])).resolve("a.test", 80)


async def test_what_is_connected_to_is_what_was_checked() -> None:
    """The first answer is good, later ones would be a metadata address: the refusal comes before a socket is made."""
    with small_web({"/": b"x"}) as web:
        resolver = Changing(["127.0.0.1"], ["169.254.169.254"])
        connector = guarded_connector(LOCAL, 4, resolver)
        connector._use_dns_cache = False
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.get(f"http://a.test:{web.port}/", headers={"Connection": "close"}) as answer:
                assert answer.status == 200
            with pytest.raises(EgressRefused):
                await session.get(f"http://b.test:{web.port}/")
    assert resolver.asked == 2


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "[64:ff9b::a9fe:a9fe]"]
)
async def test_literal_addresses_are_refused_before_a_socket_exists(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("pipelines.fetch.guard.socket.socket", lambda *a: made.append(a))
    async with aiohttp.ClientSession(connector=guarded_connector((), 4)) as session:
        with pytest.raises(EgressRefused, match="address"):
            await session.get(f"http://{host}/")
    assert not made
