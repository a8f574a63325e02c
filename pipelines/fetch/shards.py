"""Fetches an increment: consecutive blocks of its candidates become shards, each published whole or not at all.

One asyncio loop does all the waiting, decoder processes do the work. Several shards are under way at once, so that
a slow host holds back its own rows only; encoded images wait on disk, so memory is bounded by the open connections.
A shard's ledger part lands first (one row per candidate), then its tar, then its table; what is left to do is found by
one listing. Rows are in order of `url_key`, so equal responses give equal bytes.
"""

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, NamedTuple

import pyarrow as pa

from pairs.fingerprint import fingerprint
from pairs.identity import make_uid, sha256_hex
from pairs.recipe import FetchSpec, SourceSpec
from pairs.schemas import LEDGER, PAIRS
from pairs.shard import ShardRef, list_shards, write_shard
from pairs.store import advice, table_metadata
from pairs.workspace import Workspace, refused
from pipelines.candidates import part
from pipelines.fetch import decode, pool
from pipelines.fetch.client import NO_HEADERS, Answer, Client, Failure, Headers, Limits, Response, open_client
from pipelines.fetch.guard import networks
from pipelines.fetch.robots import Robots, opt_out
from pipelines.sources import Progress, Row, load_source
from pipelines.sources.folder import Outside

VERSION = 1  # raise it when equal responses give other bytes
AHEAD = 2000  # the next shard begins when fewer candidates than this are under way
ACCEPT = "image/webp,image/png,image/jpeg,image/gif;q=0.8,*/*;q=0.5"
ENTERS = ("side_px", "format", "quality", "shard_pairs", "max_bytes", "max_pixels", "min_side_px")


@dataclass(frozen=True)
class FetchCounts:
    """Of a whole increment: `candidates` = `ok` + the sum of `failed` ("status/reason"). `shards` were made now,
    `reused` were there. `success` is the share of ok among what was asked for, refusals left out; 1 for none."""

    candidates: int
    ok: int
    shards: int
    reused: int
    failed: dict[str, int] = field(default_factory=dict)
    requests: int = 0  # sent now, robots.txt included

    @property
    def refused(self) -> int:
        return sum(count for name, count in self.failed.items() if name.startswith("refused/"))

    @property
    def asked(self) -> int:
        """Candidates that nobody refused: without any, `success` says nothing."""
        return self.candidates - self.refused

    @property
    def success(self) -> float:
        return self.ok / self.asked if self.asked else 1.0


def fetch_fingerprint(spec: FetchSpec) -> str:
    """Over the settings that influence the bytes of pair shards, and the versions of this code."""
    settings = {name: getattr(spec, name) for name in ENTERS}
    return fingerprint({"fetch": VERSION, "decode": decode.VERSION, **settings})


def ledger_part(source: str, increment: str, index: int) -> str:
    return f"ledger/{source}/{increment}/{index:05d}.parquet"


def fetch_increment(
    workspace: Workspace, name: str, spec: SourceSpec, fetch_spec: FetchSpec, increment: str, progress: Progress
) -> FetchCounts:
    """Makes the pair shards of an increment that are not there yet; call it under the workspace's lock."""
    mark = fetch_fingerprint(fetch_spec)
    folder = f"pairs/{name}-{mark}/{increment}"
    rows = workspace.store.read_table(part(name, increment)).to_pylist()
    blocks = [rows[start : start + fetch_spec.shard_pairs] for start in range(0, len(rows), fetch_spec.shard_pairs)]
    _turn_ledger(workspace, name, increment, mark)
    done = {ref.index for ref in list_shards(workspace.store, folder)}
    left = [index for index in range(len(blocks)) if index not in done]
    requests = 0
    if left:
        job = Job(workspace, name, spec, fetch_spec, increment, folder, mark, progress, len(rows))
        job.finished = len(rows) - sum(len(blocks[index]) for index in left)
        requests = asyncio.run(_fetch_all(job, [(index, blocks[index]) for index in left]))
    return _count(workspace, name, increment, len(left), len(done), requests)


def _turn_ledger(workspace: Workspace, name: str, increment: str, mark: str) -> None:
    """An increment has one ledger row per candidate: puts aside the parts that a fetch with other settings wrote, and
    takes up again those of a fetch with these."""
    store, folder = workspace.store, f"{name}/{increment}"
    for path in store.files(f"ledger/{folder}", ".parquet"):
        owner = table_metadata(store.read_table(path, ["url_key"])).get("fetch", "unknown")
        if owner != mark:
            store.write(f"ledger-aside/{folder}/{owner}/{path.rpartition('/')[2]}", store.read(path))
            store.delete(path)
    for path in store.files(f"ledger-aside/{folder}/{mark}", ".parquet"):
        store.write(f"ledger/{folder}/{path.rpartition('/')[2]}", store.read(path))
        store.delete(path)


def _count(workspace: Workspace, name: str, increment: str, made: int, reused: int, requests: int) -> FetchCounts:
    counts: Counter[str] = Counter()
    for path in workspace.store.files(f"ledger/{name}/{increment}", ".parquet"):
        table = workspace.store.read_table(path, ["status", "reason"])
        for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
            counts["ok" if status == "ok" else f"{status}/{reason}"] += 1
    ok = counts.pop("ok", 0)
    return FetchCounts(ok + counts.total(), ok, made, reused, dict(sorted(counts.items())), requests)


@dataclass
class Job:
    """One call of `fetch_increment`, and how far it is."""

    workspace: Workspace
    name: str
    spec: SourceSpec
    fetch: FetchSpec
    increment: str
    folder: str
    mark: str
    progress: Progress
    total: int
    finished: int = 0
    ok: int = 0

    def tell(self) -> None:
        self.progress(self.finished, self.total, f"{self.ok} images")


class Tools(NamedTuple):
    """What every candidate is fetched with."""

    client: Client
    robots: Robots
    decode: pool.Decode
    read: Callable[[str, int], bytes] | None  # of a local source
    dead: dict[str, set[str]]


async def _fetch_all(job: Job, blocks: list[tuple[int, list[Row]]]) -> int:
    """Fetches and publishes the blocks; returns the requests sent."""
    settings = job.fetch
    client = open_client(
        settings.agent, settings.per_host, settings.connections, networks(job.spec.allow, f"sources.{job.name}")
    )
    read = getattr(load_source(job.name, job.spec), "read", None)
    cores = min(len(os.sched_getaffinity(0)), sum(len(rows) for _, rows in blocks))
    pixels = decode.DecodeSpec(
        settings.side_px, settings.format, settings.quality, settings.max_pixels, settings.min_side_px
    )
    async with client.session, pool.decoders(pixels, cores) as decode_one:
        tools = Tools(client, Robots(client), decode_one, read, job.workspace.tombstones())
        await _schedule(job, tools, blocks)
    return client.requests


async def _schedule(job: Job, tools: Tools, blocks: list[tuple[int, list[Row]]]) -> None:
    """Begins one shard after another, so many ahead that `AHEAD` candidates are under way."""
    running: set[asyncio.Task[None]] = set()
    ahead = Ahead()
    try:
        for index, rows in blocks:
            while ahead.left >= AHEAD:
                ahead.moved.clear()
                await ahead.moved.wait()
                _raise_first(running)
            ahead.left += len(rows)
            task = asyncio.create_task(_make_shard(job, tools, index, rows, ahead))
            task.add_done_callback(lambda _: ahead.moved.set())  # one that failed rings too, or nobody would look
            running.add(task)
        while running:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            _raise_first(ended)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@dataclass
class Ahead:
    """How many candidates are under way, and a bell for when that changes."""

    left: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def done(self) -> None:
        self.left -= 1
        self.moved.set()


def _raise_first(tasks: set["asyncio.Task[None]"]) -> None:
    for task in tasks:
        if task.done():
            task.result()


class Outcome(NamedTuple):
    """What became of a candidate: its ledger row, and its pair row with the place of its image in the spool."""

    ledger: Row
    pair: Row | None
    place: tuple[int, int] = (0, 0)


async def _make_shard(job: Job, tools: Tools, index: int, rows: list[Row], ahead: Ahead) -> None:
    tasks: list[asyncio.Task[Outcome]] = []
    try:  # the spool has no name; it lies on the workspace's disk where that is local
        with advice(job.folder), tempfile.TemporaryFile(dir=job.workspace.store.local) as spool:
            tasks = [asyncio.create_task(_one(job, tools, row, spool, ahead)) for row in rows]
            _publish(job, index, await asyncio.gather(*tasks), spool)
    finally:
        for task in tasks:
            task.cancel()


async def _one(job: Job, tools: Tools, row: Row, spool: IO[bytes], ahead: Ahead) -> Outcome:
    started, clock = datetime.now(UTC), time.monotonic()
    answer = await _body(job, tools, row)
    size = len(answer.result.body) if isinstance(answer.result, Response) else 0
    tools.client.hold(size)
    outcome = await _keep(job, tools, row, answer, spool)
    tools.client.hold(-size)
    outcome.ledger.update(started_at=started, elapsed_s=time.monotonic() - clock)
    job.finished += 1
    job.ok += outcome.pair is not None
    job.tell()
    ahead.done()
    return outcome


async def _body(job: Job, tools: Tools, row: Row) -> Answer:
    """The candidate's bytes, from the web or from a local source, or why there are none."""
    if row["opt_out"] is not None:
        return Answer(Failure("refused", row["opt_out"]), 0)
    if refused(tools.dead, row["url_key"], row["url"]):
        return Answer(Failure("refused", "forgotten"), 0)
    if tools.read:
        await tools.client.room()
        return Answer(_read_local(tools.read, row["url"].partition(":")[2], job.fetch.max_bytes), 1)
    limits = Limits(job.fetch.deadline_s, job.fetch.max_bytes, attempts=job.fetch.attempts)

    def judge(headers: Headers) -> Failure | None:
        word = opt_out(headers.getall("X-Robots-Tag", []), job.fetch.agent)
        return Failure("refused", word) if word else None

    return await tools.client.fetch(row["url"], limits, tools.robots.permit, judge, ACCEPT)


def _read_local(read: Callable[[str, int], bytes], relative: str, max_bytes: int) -> Response | Failure:
    try:
        data = read(relative, max_bytes)
    except Outside:
        return Failure("refused", "outside_the_folder")
    except OSError:
        return Failure("permanent", "unreadable_file")
    return Failure("permanent", "too_large") if len(data) > max_bytes else Response(relative, 0, NO_HEADERS, data)


async def _keep(job: Job, tools: Tools, row: Row, answer: Answer, spool: IO[bytes]) -> Outcome:
    """Decodes what was fetched and puts the encoded image into the spool."""
    result = answer.result
    ledger: Row = dict.fromkeys(LEDGER.names) | {name: row[name] for name in ("url_key", "url")}
    ledger["attempts"] = answer.attempts
    if isinstance(result, Failure):
        return Outcome(ledger | _verdict(result), None)
    data = result.body
    sha256 = sha256_hex(data)
    uid = make_uid(row["url_key"], sha256)
    ledger |= {"http_status": result.status or None, "size_bytes": len(data), "sha256": sha256}
    if uid in tools.dead["uid"] or sha256 in tools.dead["sha256"]:
        return Outcome(ledger | {"status": "refused", "reason": "forgotten"}, None)
    decoded = await tools.decode(data)
    if isinstance(decoded, Failure):
        return Outcome(ledger | {"status": decoded.status, "reason": decoded.reason}, None)
    place = (spool.seek(0, os.SEEK_END), len(decoded.image))
    spool.write(decoded.image)
    pair = _pair(job, row, uid, sha256, len(data)) | decoded.facts
    return Outcome(ledger | {"status": "ok", "uid": uid}, pair, place)


def _verdict(failure: Failure) -> Row:
    return {"status": failure.status, "reason": failure.reason, "http_status": failure.http_status}


def _pair(job: Job, row: Row, uid: str, sha256: str, size: int) -> Row:
    facts = {name: row[name] for name in ("url_key", "url", "texts", "page", "license", "source_uid")}
    text = row["texts"][0]["text"] if row["texts"] else ""
    made = {"uid": uid, "text": text, "status": "ok", "sha256": sha256, "original_bytes": size}
    return facts | made | {"source": job.name, "increment": job.increment, "image_ext": job.fetch.format}


def _publish(job: Job, index: int, outcomes: list[Outcome], spool: IO[bytes]) -> None:
    """Ledger part, then tar, then table."""
    store = job.workspace.store
    ledger = pa.Table.from_pylist([outcome.ledger for outcome in outcomes], schema=LEDGER)
    store.write_table(ledger_part(job.name, job.increment, index), ledger, {"fetch": job.mark})
    write_shard(store, ShardRef(job.folder, index), _read_spool(outcomes, spool), PAIRS)


def _read_spool(outcomes: list[Outcome], spool: IO[bytes]) -> Iterator[tuple[Row, bytes]]:
    for outcome in outcomes:
        if outcome.pair is not None:
            spool.seek(outcome.place[0])
            yield outcome.pair, spool.read(outcome.place[1])
