"""The egress guard: which addresses a URL out of the web may reach, decided where the connection is made.

Screening URLs beforehand loses to DNS: a name may answer differently a moment later. So the check sits in the
connector, once on what the resolver said and once more on the very address that the socket is about to connect
to, which also covers literal addresses and every redirect. Nothing private, loopback, link-local, multicast or
reserved is reached, nor any IPv6 form that carries an IPv4 address, unless a source's `allow` names its network.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pairs.errors import PairmillError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS = frozenset({80, 443})
GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # everything else of IPv6 is local, multicast or a translation
CLOSED = [
    ipaddress.ip_network(name)
    for name in (
        # "this host", private, shared, loopback, link-local, protocol assignments, tests, relays, multicast, reserved
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Teredo and other protocol assignments, documentation, 6to4
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:\d+|0[xX][0-9a-fA-F]*)\.?")  # ends in a number: 2130706433, 0177.0.0.1


class EgressRefused(Exception):
    """A connection that the guard forbids. No OSError, so that no library takes it for a network failure."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


def networks(names: Iterable[str], where: str) -> tuple[Network, ...]:
    """The networks that `allow` names; `where` goes into the error message."""
    found = []
    for name in names:
        try:
            found.append(ipaddress.ip_network(name))
        except ValueError as error:
            raise PairmillError(
                expected=f"a network such as 127.0.0.0/8 in {where}.allow", found=str(error), remedy="correct it"
            ) from None
    return tuple(found)


def refuse_address(host: str, port: int, allow: Iterable[Network] = ()) -> str | None:
    """Why a socket may not connect to the literal address `host`; None where it may."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if any(address in network for network in allow):
        return None
    if any(address in network for network in CLOSED):
        return "address"
    if address.version == 6 and address not in GLOBAL_V6:
        return "address"
    return None if port in PORTS else "port"


def refuse_url(url: URL) -> str | None:
    """Why a URL may not be asked for whatever its address; None where it may."""
    if url.scheme not in ("http", "https"):
        return "scheme"
    if not url.host:
        return "bad_url"
    if url.user is not None or url.password is not None:
        return "credentials"
    if NUMERIC_HOST.fullmatch(url.host) and not _dotted_quad(url.host):
        return "numeric_host"
    return None


def _dotted_quad(host: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(host))
    except ValueError:
        return False


class GuardedResolver(AbstractResolver):
    """Resolves a name and refuses it if any of its addresses is forbidden."""

    def __init__(self, allow: tuple[Network, ...], inner: AbstractResolver | None = None) -> None:
        self._allow, self._inner = allow, inner or aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        answers = await self._inner.resolve(host, port, family)
        for answer in answers:
            if reason := refuse_address(answer["host"], port, self._allow):
                raise EgressRefused(reason, f"{host} is {answer['host']}")
        return answers

    async def close(self) -> None:
        await self._inner.close()


def guarded_connector(
    allow: tuple[Network, ...], connections: int, resolver: AbstractResolver | None = None
) -> aiohttp.TCPConnector:
    """A connector whose every socket has passed the guard. `resolver` stands in for the system's in tests."""

    def checked_socket(info: tuple) -> socket.socket:
        family, kind, protocol, _, sockaddr = info
        if reason := refuse_address(str(sockaddr[0]), int(sockaddr[1]), allow):
            raise EgressRefused(reason, f"{sockaddr[0]} port {sockaddr[1]}")
        return socket.socket(family, kind, protocol)

    return aiohttp.TCPConnector(
        resolver=GuardedResolver(allow, resolver),
        socket_factory=checked_socket,
        happy_eyeballs_delay=None,  # one address after another, so that a refusal ends the attempt
        limit=connections,
        ttl_dns_cache=300,
    )
