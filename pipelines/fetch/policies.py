"""The policy files of origins (robots.txt, tdmrep.json): asked for once, kept a day (RFC 9309), across runs too.

They lie in one small table, `cache/policies.parquet`, read when a fetch begins and written when it ends; a kill costs
asking again. Only what is settled is kept: a body, or that there is none (4xx but 408 and 429, or 204, kept as an empty
one). What failed otherwise is asked for again after `RETRY_S`.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import pyarrow as pa

from pairs.errors import PairmillError
from pairs.store import Store
from pipelines.fetch.client import Client, Limits, Permit, Response, any_headers, any_url
from pipelines.fetch.failures import Failure

PATH = "cache/policies.parquet"
KEPT_S = 24 * 3600.0
RETRY_S = 300.0
LIMITS = Limits(deadline_s=15.0, max_bytes=500 * 1024, redirects=5, attempts=2, cut=True)
SCHEMA = pa.schema([("url", pa.string()), ("asked_at", pa.float64()), ("text", pa.string())])


@dataclass
class Policies:
    """Texts by URL, with the time (seconds since 1970) when each was asked for."""

    known: dict[str, tuple[float, str]] = field(default_factory=dict)
    _asked: "dict[str, tuple[float, asyncio.Task[str | Failure]]]" = field(default_factory=dict)

    async def get(self, client: Client, url: str, permit: Permit = any_url) -> str | Failure:
        """The file's text; "" where there is none; a Failure where that can't be told now. `permit` is asked at each
        redirect."""
        now = time.time()
        if url in self.known and now - self.known[url][0] < KEPT_S:
            return self.known[url][1]
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
        self.known[url] = now, text
        return text


def _is_none(failure: Failure) -> bool:
    """Whether the server said that there is no such file."""
    status = failure.http_status or 0
    return failure.status == "permanent" and (status == 204 or 400 <= status < 500)


def load_policies(store: Store) -> Policies:
    """What earlier runs kept and is fresh still; a damaged cache counts as empty."""
    with contextlib.suppress(PairmillError):
        if store.has(PATH):
            rows = store.read_table(PATH).to_pylist()
            fresh = time.time() - KEPT_S
            return Policies(
                {r["url"]: (r["asked_at"], r["text"]) for r in rows if fresh < r["asked_at"] <= time.time()}
            )
    return Policies()


def save_policies(store: Store, policies: Policies) -> None:
    """Keeps them for the next run, if there are any."""
    if not policies.known:
        return
    rows = [{"url": url, "asked_at": at, "text": text} for url, (at, text) in sorted(policies.known.items())]
    store.write_table(PATH, pa.Table.from_pylist(rows, schema=SCHEMA))
