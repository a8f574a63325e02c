"""What a site forbids: robots.txt by RFC 9309, and the opt-out words of X-Robots-Tag and `<meta name=robots>`.

robots.txt is fetched once per origin through the same guarded client and kept for the run. As the RFC says: an
answer of 4xx allows everything, an unreachable or failing one (5xx, and 429) allows nothing, and only the first
500 KiB count.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from protego import Protego
from yarl import URL

from pipelines.fetch.client import Client, Failure, Limits, Response, any_headers, any_url

ROBOTS_LIMITS = Limits(deadline_s=15.0, max_bytes=500 * 1024, redirects=5, attempts=2, cut=True)
OPT_OUT = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none"})
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


def agent_token(agent: str) -> str:
    """The product token that robots.txt knows us by: "pairmill/1.0 (+https://…)" is "pairmill"."""
    return agent.split("/")[0].split()[0].lower()


def directives(values: Iterable[str], agent: str) -> set[str]:
    """The robots words that hold for `agent`, of headers or meta tags such as "noai", "otherbot: noindex, nofollow"."""
    words: set[str] = set()
    for value in values:
        holds = True
        for part in value.lower().split(","):
            head, colon, rest = part.partition(":")
            word = head.strip()
            if colon and word not in WITH_VALUE:
                holds, word = word in ("*", agent_token(agent)), rest.strip()
            if holds and word:
                words.add(word)
    return words


def opt_out(values: Iterable[str], agent: str) -> str | None:
    """The first (by name) opt-out word that holds for `agent`, or None."""
    return min(directives(values, agent) & OPT_OUT, default=None)


@dataclass
class Robots:
    """The robots.txt files of a run. `permit` fits `Client.fetch`."""

    client: Client
    _known: dict[str, "asyncio.Task[Protego | Failure | None]"] = field(default_factory=dict)

    async def permit(self, url: URL) -> Failure | None:
        """Why `url` may not be asked for, or None."""
        origin = str(url.origin())
        if origin not in self._known:
            self._known[origin] = asyncio.create_task(self._load(f"{origin}/robots.txt"))
        rules = await asyncio.shield(self._known[origin])
        if isinstance(rules, Protego):
            return None if rules.can_fetch(str(url), agent_token(self.client.agent)) else Failure("refused", "robots")
        return rules

    async def sitemaps(self, url: URL) -> list[str]:
        """The sitemaps that robots.txt of `url`'s origin names."""
        await self.permit(url)
        rules = await self._known[str(url.origin())]
        return list(rules.sitemaps) if isinstance(rules, Protego) else []

    async def _load(self, url: str) -> Protego | Failure | None:
        answer = await self.client.fetch(url, ROBOTS_LIMITS, any_url, any_headers, accept="text/plain, */*;q=0.1")
        result = answer.result
        if isinstance(result, Response):
            return Protego.parse(result.body.decode("utf-8", "replace"))
        if result.status == "transient":
            return Failure("transient", f"robots_{result.reason}", result.http_status)
        return result if result.status == "refused" else None
