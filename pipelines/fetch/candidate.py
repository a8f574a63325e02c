"""One candidate becomes a ledger row and, where all is well, a pair: permission, bytes, blocklists, decoding.

The encoded image goes into the shard's spool on disk, so that memory is bounded by what is under way.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import IO, NamedTuple

from yarl import URL

from pairs.identity import make_uid, sha256_hex
from pairs.recipe import FetchSpec
from pairs.schemas import LEDGER
from pairs.workspace import KINDS, Dead, refused
from pipelines.fetch.blocklists import Blocklists
from pipelines.fetch.client import Answer, Client, Limits, Permit, Response
from pipelines.fetch.failures import NO_HEADERS, Failure, Headers
from pipelines.fetch.ledger import Settled
from pipelines.fetch.pool import Decode
from pipelines.fetch.robots import opted_out
from pipelines.sources import HTTP, Outside, Row

ASK = {"Accept": "image/webp,image/png,image/jpeg,image/gif;q=0.8,*/*;q=0.5"}


@dataclass(frozen=True)
class Tools:
    """What every candidate of an increment is fetched with."""

    source: str
    increment: str
    fetch: FetchSpec
    client: Client
    permit: Permit
    decode: Decode
    blocked: Blocklists
    read: Callable[[str, int], bytes] | None = None  # of a local source
    dead: Dead = field(default_factory=lambda: dict.fromkeys(KINDS, frozenset()))
    settled: Settled = field(default_factory=Settled)


class Outcome(NamedTuple):
    """What became of a candidate: its ledger row, and its pair row with the place of its image in the spool."""

    ledger: Row
    pair: Row | None
    place: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """ok, or status/reason."""
        return "ok" if self.pair is not None else f"{self.ledger['status']}/{self.ledger['reason']}"


async def fetch_one(tools: Tools, row: Row, spool: IO[bytes]) -> Outcome:
    """Never raises for what a site or an image does."""
    started, clock = datetime.now(UTC), time.monotonic()
    answer = await _body(tools, row)
    size = len(answer.result.body) if isinstance(answer.result, Response) else 0
    tools.client.hold(size)
    try:
        outcome = await _keep(tools, row, answer, spool)
    finally:
        tools.client.hold(-size)
    outcome.ledger.update(started_at=started, elapsed_s=time.monotonic() - clock)
    if isinstance(answer.result, Failure) and answer.result.retry_after_s:
        outcome.ledger["retry_at"] = datetime.now(UTC) + timedelta(seconds=answer.result.retry_after_s)
    return outcome


def given_up(row: Row, reason: str) -> Outcome:
    """The outcome of a row that was ended by us, and may come again."""
    return Outcome(_blank(row, 1) | {"status": "transient", "reason": reason, "started_at": datetime.now(UTC)}, None)


def _blank(row: Row, attempts: int) -> Row:
    ledger: Row = dict.fromkeys(LEDGER.names)
    return ledger | {"url_key": row["url_key"], "url": row["url"], "attempts": attempts}


def _refusal(tools: Tools, row: Row) -> str | None:
    """Why it isn't even asked for."""
    if not row["url"] or refused(tools.dead, row["url_key"], row["url"]):
        return "forgotten"
    return row["opt_out"] or tools.settled.get(row["url_key"])


async def _body(tools: Tools, row: Row) -> Answer:
    """The candidate's bytes, from the web or from a local source, or why there are none."""
    if reason := _refusal(tools, row):
        return Answer(Failure("refused", reason), 0)
    if tools.read:
        await tools.client.room()
        url = row["url"]
        path = url if url.lower().startswith(HTTP) else url.partition(":")[2]
        return Answer(_read_local(tools.read, path, tools.fetch.max_bytes), 1)
    limits = Limits(tools.fetch.deadline_s, tools.fetch.max_bytes, attempts=tools.fetch.attempts)

    def judge(headers: Headers) -> Failure | None:
        word = opted_out(headers, headers.getall("X-Robots-Tag", []), tools.fetch.agent)
        return Failure("refused", word) if word else None

    return await tools.client.fetch(row["url"], limits, tools.permit, judge, ASK)


def _read_local(read: Callable[[str, int], bytes], relative: str, max_bytes: int) -> Response | Failure:
    try:
        data = read(relative, max_bytes)
    except Outside:
        return Failure("refused", "outside_the_folder")
    except OSError:
        return Failure("permanent", "unreadable_file")
    return Failure("permanent", "too_large") if len(data) > max_bytes else Response(relative, 0, NO_HEADERS, data)


async def _keep(tools: Tools, row: Row, answer: Answer, spool: IO[bytes]) -> Outcome:
    """Decodes what was fetched and puts the encoded image into the spool."""
    result, ledger = answer.result, _blank(row, answer.attempts)
    if isinstance(result, Failure):
        return Outcome(ledger | _verdict(result) | {"http_status": result.http_status}, None)
    data = result.body
    sha256 = sha256_hex(data)
    uid = make_uid(row["url_key"], sha256)
    ledger |= {"http_status": result.status or None, "size_bytes": len(data), "sha256": sha256}
    dead = uid in tools.dead["uid"] or sha256 in tools.dead["sha256"]
    if stop := Failure("refused", "forgotten") if dead else tools.blocked.bytes(sha256):
        return Outcome(ledger | _verdict(stop), None)
    decoded = await tools.decode(data)
    if not isinstance(decoded, Failure):
        decoded = tools.blocked.picture(decoded.facts.pop("phash", None)) or decoded
    if isinstance(decoded, Failure):
        return Outcome(ledger | _verdict(decoded), None)
    place = (spool.seek(0, os.SEEK_END), len(decoded.image))
    spool.write(decoded.image)
    pair = _pair(tools, row, uid, sha256, len(data)) | decoded.facts
    return Outcome(ledger | {"status": "ok", "uid": uid}, pair, place)


def _verdict(failure: Failure) -> Row:
    return {"status": failure.status, "reason": failure.reason}


def _pair(tools: Tools, row: Row, uid: str, sha256: str, size: int) -> Row:
    facts = {name: row[name] for name in ("url_key", "url", "texts", "page", "license", "source_uid")}
    text = row["texts"][0]["text"] if row["texts"] else ""
    made = {"uid": uid, "text": text, "status": "ok", "sha256": sha256, "original_bytes": size}
    return facts | made | {"source": tools.source, "increment": tools.increment, "image_ext": tools.fetch.format}


def host_of(row: Row) -> str:
    """For the gates; "" for a local file and a forgotten row."""
    try:
        return URL(row["url"] or "").host or ""
    except ValueError:
        return ""
