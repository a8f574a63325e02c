"""What a site forbids: robots.txt (RFC 9309), the TDM Reservation Protocol (W3C), and the opt-out words of X-Robots-Tag
and `<meta name=robots>`.

Both files are had once per origin through the same guarded client. As the RFC says: an answer of 4xx to robots.txt
allows everything, an unreachable or failing one (5xx, and 429) allows nothing, and only the first 500 KiB count. Its
Crawl-delay slows the host down.

TDMRep is read as in the Community Group's final report of 10 May 2024. In tdmrep.json (section "TDM File on the Origin
Server") the first rule whose `location` matches holds; patterns are those of robots.txt ("Use of regular expressions").
By "Processing priority" a header would overrule the file, and a meta tag both; we take the strictest, for we don't ask
for what the file reserves. A file that can't be had or read reserves nothing.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from string import ascii_letters, digits, printable
from typing import Any
from urllib.parse import quote

from protego import Protego
from yarl import URL

from pipelines.fetch.client import Client, Permit, any_url
from pipelines.fetch.failures import Failure
from pipelines.fetch.policies import Policies, parsed

OPT_OUT = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none", "unavailable_after"})
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
DATED = re.compile(r"unavailable_after\s*:\s*((?:[a-z]+day|mon|tue|wed|thu|fri|sat|sun)\s*,)?([^,]*)", re.IGNORECASE)
RESERVED = "tdm"
VALUES = {1: True, "1": True, 0: False, "0": False}  # any other is an error of protocol, and no rule
ESCAPED = re.compile("%([0-9A-Fa-f]{2})")
PLAIN = frozenset(ascii_letters + digits + "-._~$*")  # equal whether it is percent-encoded or not
SHORT = 250  # characters of a path that is kept in both forms: strangers write them
MAX_CRAWL_DELAY_S = 30.0  # a host that wants to be asked less often isn't asked


def agent_token(agent: str) -> str:
    """The product token that robots.txt knows us by: "pairmill/1.0 (+https://…)" is "pairmill"."""
    return agent.split("/")[0].split()[0].lower()


def directives(values: Iterable[str], agent: str) -> set[str]:
    """The robots words that hold for `agent`, of headers or meta tags such as "noai", "otherbot: noindex, nofollow".
    `unavailable_after` is among them once its date has passed."""
    words: set[str] = set()
    for value in values:
        holds = True
        for part in DATED.sub(_settled, value).lower().split(","):
            head, colon, rest = part.partition(":")
            word = head.strip()
            if colon and word not in WITH_VALUE:
                holds, word = word in ("*", agent_token(agent)), rest.strip()
            if holds and word:
                words.add(word)
    return words


def _settled(found: re.Match[str]) -> str:
    """The word alone where its date has passed, or can't be read; nothing where it lies ahead."""
    date = found[2].strip()
    for read in (datetime.fromisoformat, parsedate_to_datetime, _spelled_date):
        try:
            when = read(date)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return "unavailable_after" if when.timestamp() <= time.time() else ""
        except (ValueError, TypeError, OverflowError):
            continue
    return "unavailable_after"


def _spelled_date(text: str) -> datetime:
    """RFC 850: 25-Jun-10 15:00:00 GMT."""
    return datetime.strptime(text[:18], "%d-%b-%y %H:%M:%S")


def opt_out(values: Iterable[str], agent: str) -> str | None:
    """The first (by name) opt-out word that holds for `agent`, or None."""
    return min(directives(values, agent) & OPT_OUT, default=None)


def opted_out(headers: Mapping[str, str], robots: Iterable[str], agent: str) -> str | None:
    """Why an answer with these headers, whose X-Robots-Tag values are `robots`, must not be used; None where it may."""
    return opt_out(robots, agent) or (RESERVED if headers.get("TDM-Reservation", "").strip() == "1" else None)


@dataclass
class Robots:
    """What the policy files of each origin say. `permit` fits `Client.fetch`. What `bar` refuses isn't asked for
    anything, policy files included, nor do their redirects lead there."""

    client: Client
    policies: Policies = field(default_factory=Policies)
    bar: Permit = any_url

    async def permit(self, url: URL) -> Failure | None:
        """Why `url` may not be asked for, or None."""
        if barred := await self.bar(url):
            return barred
        origin = str(url.origin())
        text = await self.policies.get(self.client, f"{origin}/robots.txt", self.bar)
        if isinstance(text, Failure):
            reason = f"robots_{text.reason}" if text.status == "transient" else text.reason
            return text if text.status == "refused" else text._replace(reason=reason)
        rules, token = parsed(Protego.parse, text), agent_token(self.client.agent)
        if not rules.can_fetch(str(url), token):
            return Failure("refused", "robots")
        delay, host = rules.crawl_delay(token) or 0.0, self.client.host(url)
        if delay > MAX_CRAWL_DELAY_S:
            return Failure("refused", "crawl_delay")
        host.delay_s = max(host.delay_s, delay)
        reserved = await self.policies.get(self.client, f"{origin}/.well-known/tdmrep.json", self.bar)
        path, rules_ = url.raw_path_qs, parsed(_reservations, reserved) if isinstance(reserved, str) else ()
        holds = next((reserves for location, reserves in rules_ if _matches(path, location)), False)
        return Failure("refused", RESERVED) if holds else None

    async def sitemaps(self, url: URL) -> list[str]:
        """The sitemaps that robots.txt of `url`'s origin names."""
        barred = await self.bar(url)
        text = barred or await self.policies.get(self.client, f"{url.origin()}/robots.txt", self.bar)
        return list(parsed(Protego.parse, text).sitemaps) if isinstance(text, str) else []


def _reservations(text: str) -> tuple[tuple[str, bool], ...]:
    """The rules of a tdmrep.json in order: the pattern of their paths, and whether it is reserved."""
    try:
        rules: Any = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return ()
    rules = [rule for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    told = [(rule.get("location"), rule.get("tdm-reservation")) for rule in rules]
    return tuple(
        (str(at), VALUES[value]) for at, value in told if at and isinstance(value, int | str) and value in VALUES
    )


def _as_octets(path: str) -> str:
    """A path in the form in which paths are compared: reserved octets and those beyond ASCII are percent-encoded."""
    return _short(path) if len(path) < SHORT else _octets(path)


def _octets(path: str) -> str:

    def plain(found: re.Match[str]) -> str:
        return octet if (octet := chr(int(found[1], 16))) in PLAIN else found[0].upper()

    return ESCAPED.sub(plain, quote(path, safe=printable, errors="replace"))


_short = lru_cache(maxsize=1 << 13)(_octets)


def _matches(path: str, pattern: str) -> bool:
    """Whether `path` begins as `pattern` says: `*` stands for anything, a last `$` for the end. Linear: no regular
    expression is made of what a stranger wrote."""
    path = _as_octets(path)
    first, *pieces = map(_as_octets, pattern.removesuffix("$").split("*"))
    if not path.startswith(first):
        return False
    at = len(first)
    for number, piece in enumerate(pieces):
        ends = pattern.endswith("$") and number == len(pieces) - 1
        found = path.endswith(piece) and len(path) - len(piece) if ends else path.find(piece, at)
        if found is False or found < at:
            return False
        at = found + len(piece)
    return bool(pieces) or not pattern.endswith("$") or path == first
