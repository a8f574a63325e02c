"""The policy files of origins (robots.txt, tdmrep.json): asked for once, kept a day (RFC 9309), across runs too; and
until when hosts want no request (`cache/rests.parquet`), which crawls and fetches tell each other.

The files lie in one small table, `cache/policies.parquet`, read when a fetch begins and written when it ends; a kill
costs asking again. Only what is settled is kept: a body, or that there is none (4xx but 408 and 429, or 204, kept as an
empty one). What failed otherwise is asked for again after `RETRY_S`. Beyond `KEPT_BYTES` the longest unused go, and of
what is parsed (25 times its text at worst) all beyond `PARSED_BYTES` of text: strangers write these files.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Any, TypeVar

import pyarrow as pa
from yarl import URL

from pairs.errors import PairmillError
from pairs.identity import url_key
from pairs.store import Store
from pairs.workspace import KINDS, Dead, refused
from pipelines.fetch.client import Client, Limits, Permit, Response, any_headers, any_url
from pipelines.fetch.failures import Failure

PATH, RESTS = "cache/policies.parquet", "cache/rests.parquet"
KEPT_S = 24 * 3600.0
RETRY_S = 300.0
KEPT_BYTES, PARSED_BYTES = 64 << 20, 8 << 20
LIMITS = Limits(deadline_s=15.0, max_bytes=500 * 1024, redirects=5, attempts=2, cut=True)
SCHEMA = pa.schema([("url", pa.string()), ("asked_at", pa.float64()), ("text", pa.string())])
RESTING = pa.schema([("url", pa.string()), ("until", pa.float64())])
NONE: Dead = dict.fromkeys(KINDS, frozenset())

T = TypeVar("T")


@dataclass
class Bounded:
    """The last values used, whose weights sum to `limit` at most; one that is heavier alone isn't kept."""

    limit: int
    kept: "OrderedDict[Any, tuple[int, Any]]" = field(default_factory=OrderedDict)
    weight: int = 0

    def get(self, key: Any) -> Any:
        """The value, or None."""
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key][1]

    def put(self, key: Any, weight: int, value: Any) -> None:
        self.weight += weight - self.kept.pop(key, (0, None))[0]
        self.kept[key] = weight, value
        while self.weight > self.limit:
            self.weight -= self.kept.popitem(last=False)[1][0]


_parsed = Bounded(PARSED_BYTES)


def parsed(parse: Callable[[str], T], text: str) -> T:
    """`parse(text)`, or what it gave before. It must not give None."""
    found: T | None = _parsed.get((parse, text))
    if found is None:
        _parsed.put((parse, text), getsizeof(text), found := parse(text))
    return found


@dataclass
class Policies:
    """Texts by URL, with the time (seconds since 1970) when each was asked for."""

    known: Bounded = field(default_factory=lambda: Bounded(KEPT_BYTES))
    _asked: "dict[str, tuple[float, asyncio.Task[str | Failure]]]" = field(default_factory=dict)

    async def get(self, client: Client, url: str, permit: Permit = any_url) -> str | Failure:
        """The file's text; "" where there is none; a Failure where that can't be told now. `permit` is asked at each
        redirect."""
        now = time.time()
        known: tuple[float, str] | None = self.known.get(url)
        if known and now - known[0] < KEPT_S:
            return known[1]
        at, task = self._asked.get(url, (0.0, None))
        if task is None or (task.done() and now - at >= RETRY_S):
            task = asyncio.create_task(self._load(client, url, now, permit))
            self._asked[url] = now, task
        return await asyncio.shield(task)

    async def _load(self, client: Client, url: str, now: float, permit: Permit) -> str | Failure:
        answer = await client.fetch(url, LIMITS, permit, any_headers, {"Accept": "text/plain, */*;q=0.1"})
        result = answer.result
        if isinstance(result, Failure) and not _is_none(result):
            return result if result.status == "refused" else result._replace(status="transient")
        text = result.body.decode("utf-8", "replace") if isinstance(result, Response) else ""
        self.keep(url, now, text)
        self._asked.pop(url, None)  # it would hold the text
        return text

    def keep(self, url: str, at: float, text: str) -> None:
        self.known.put(url, getsizeof(url) + getsizeof(text), (at, text))


def _is_none(failure: Failure) -> bool:
    """Whether the server said that there is no such file."""
    status = failure.http_status or 0
    return failure.status == "permanent" and (status == 204 or 400 <= status < 500)


def load_policies(store: Store) -> Policies:
    """What earlier runs kept and is fresh still; a damaged cache counts as empty."""
    policies, fresh = Policies(), time.time() - KEPT_S
    with contextlib.suppress(PairmillError):
        for row in store.read_table(PATH).to_pylist() if store.has(PATH) else []:
            if fresh < row["asked_at"] <= time.time():
                policies.keep(row["url"], row["asked_at"], row["text"])
    return policies


def save_policies(store: Store, policies: Policies) -> None:
    """Keeps them for the next run, if there are any."""
    if kept := policies.known.kept:
        rows = [{"url": url, "asked_at": at, "text": text} for url, (_, (at, text)) in kept.items()]
        store.write_table(PATH, pa.Table.from_pylist(rows, schema=SCHEMA))


def load_rests(store: Store) -> dict[str, float]:
    """Until when (seconds since 1970) hosts want no request, but for what is over; a damaged table counts as empty."""
    with contextlib.suppress(PairmillError):
        rows = store.read_table(RESTS).to_pylist() if store.has(RESTS) else []
        return {URL(row["url"]).host or "": row["until"] for row in rows if row["until"] > time.time()}
    return {}


def save_rests(store: Store, rests: Mapping[str, float], dead: Dead = NONE) -> None:
    """Keeps them for whoever asks next, but for what is over or forgotten."""
    urls = {str(URL.build(scheme="http", host=host, path="/")): at for host, at in rests.items() if at > time.time()}
    kept = [{"url": url, "until": at} for url, at in urls.items() if not refused(dead, url_key(url), url)]
    if kept or store.has(RESTS):
        store.write_table(RESTS, pa.Table.from_pylist(kept, schema=RESTING))
