"""Fetches an increment: consecutive blocks of its candidates become shards, each published whole or not at all.

One asyncio loop does all the waiting, decoder processes do the work. Several shards are under way at once, so that
a slow host holds back its own rows only. A shard's ledger part lands first (one row per candidate), then its tar, then
its table; what is left to do is found by one listing. Rows are in order of `url_key`: equal responses, equal bytes.
"""

import asyncio
import contextlib
import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa

from pairs.recipe import FetchSpec, SourceSpec
from pairs.schemas import LEDGER, PAIRS
from pairs.shard import ShardRef, list_shards, write_shard
from pairs.store import advice
from pairs.workspace import Workspace
from pipelines.candidates import part
from pipelines.fetch import decode, ledger, pool
from pipelines.fetch.blocklists import Blocklists, load_blocklists
from pipelines.fetch.candidate import Outcome, Tools, fetch_one, given_up, host_of
from pipelines.fetch.client import open_client, require_contact
from pipelines.fetch.gates import SuccessGate, Watch, preflight
from pipelines.fetch.guard import networks
from pipelines.fetch.policies import load_policies, load_rests, save_policies, save_rests
from pipelines.fetch.robots import Robots
from pipelines.sources import Progress, Row, load_source

AHEAD = 2000  # the next shard begins when fewer candidates than this are under way
OPEN = 32  # shards at a time: the outcomes of 10,000 candidates take 30 MB until their shard is published
CHANCES = 2  # how often a shard that doesn't move is begun anew before its rows are put off


@dataclass
class Job:
    """One call of `fetch_increment`, and how far it is."""

    workspace: Workspace
    name: str
    spec: SourceSpec
    fetch: FetchSpec
    increment: str
    group: str
    gate: SuccessGate
    blocked: Blocklists
    progress: Progress
    total: int
    finished: int = 0
    ok: int = 0
    left: int = 0  # candidates under way
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # rings when that changes

    def done(self, row: Row, outcome: Outcome) -> None:
        self.finished += 1
        self.left -= 1
        self.ok += outcome.pair is not None
        self.progress(self.finished, self.total, f"{self.ok} images")
        self.moved.set()
        self.gate.judge(outcome.name, host_of(row))


def fetch_increment(
    workspace: Workspace,
    name: str,
    spec: SourceSpec,
    fetch_spec: FetchSpec,
    increment: str,
    progress: Progress,
    floor: float = 0.0,
) -> ledger.FetchCounts:
    """Makes the pair shards of an increment that are not there yet; call it under the workspace's lock. Raises
    PairmillError where a gate stops it (`floor` is the success rate asked for) and for mistakes in the recipe."""
    store, group, size = workspace.store, f"{name}-{ledger.fetch_fingerprint(fetch_spec)}", fetch_spec.shard_pairs
    total = store.rows(part(name, increment))
    done = {ref.index for ref in list_shards(store, f"pairs/{group}/{increment}")}
    left = {n: min(size, total - n * size) for n in range(-(-total // size)) if n not in done}
    requests = 0
    if left:
        gate = SuccessGate(name, floor, ledger.outcomes(store, f"ledger/{group}") if floor else Counter())
        blocked = load_blocklists(fetch_spec.block)
        job = Job(workspace, name, spec, fetch_spec, increment, group, gate, blocked, progress, total)
        job.finished = total - sum(left.values())
        with _rare_collections():
            requests = asyncio.run(_fetch_all(job, left))
    return ledger.count_increment(store, f"ledger/{group}/{increment}", len(left), len(done), requests)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Few of the loop's objects lie in cycles: looked for as often as usual, they cost an eighth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(10_000, 20, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _blocks(job: Job, left: dict[int, int]) -> Iterator[tuple[int, list[Row]]]:
    """The candidates of each shard that is left, one shard's in memory."""
    pieces = job.workspace.store.tables(part(job.name, job.increment), job.fetch.shard_pairs)
    return ((index, table.to_pylist()) for index, table in enumerate(pieces) if index in left)


async def _fetch_all(job: Job, left: dict[int, int]) -> int:
    """Fetches and publishes the shards `left`, whose sizes it names; returns the requests sent."""
    settings, store = job.fetch, job.workspace.store
    read = getattr(load_source(job.name, job.spec), "read", None)
    if not read:
        asked = (row for _, rows in _blocks(job, left) for row in rows if row["url"] and not row["opt_out"])
        require_contact(settings.agent, map(host_of, asked))
    allow = networks(job.spec.allow, f"sources.{job.name}")
    client = open_client(settings.agent, settings.per_host, settings.connections, allow, delay_s=settings.delay_s)
    cores = min(len(os.sched_getaffinity(0)), sum(left.values()))
    names = ("side_px", "format", "quality", "max_pixels", "min_side_px")
    pixels = decode.DecodeSpec(**{n: getattr(settings, n) for n in names}, hash=len(job.blocked.hashes) > 0)
    policies = load_policies(store)
    async with client.session, pool.decoders(pixels, cores) as decode_one:
        dead = job.workspace.tombstones()
        permit = Robots(client, policies, job.blocked.bar(dead)).permit
        settled = ledger.settled(store, job.name, job.group, job.increment)
        client.rest(load_rests(store))
        facts = (client, permit, decode_one, job.blocked, read, dead, settled)
        job.progress(job.finished, job.total, await preflight(settings.agent, decode_one))
        try:
            await _schedule(job, Tools(job.name, job.increment, settings, *facts), _blocks(job, left))
        finally:
            save_policies(store, policies)
            save_rests(store, client.rests())
    return client.requests


async def _schedule(job: Job, tools: Tools, blocks: Iterator[tuple[int, list[Row]]]) -> None:
    """Begins one shard after another, so many ahead that `AHEAD` candidates are under way, in `OPEN` shards at most."""
    running: set[asyncio.Task[None]] = set()
    try:
        for index, rows in blocks:
            while job.left >= AHEAD or len(running) >= OPEN:
                job.moved.clear()
                await job.moved.wait()
                _raise_first(running)
                running = {task for task in running if not task.done()}
            job.left += len(rows)
            task = asyncio.create_task(_make_shard(job, tools, index, rows))
            task.add_done_callback(lambda _: job.moved.set())  # one that failed rings too, or nobody would look
            running.add(task)
        while running:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            _raise_first(ended)
    finally:
        await _end(running)


def _raise_first(tasks: set["asyncio.Task[None]"]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def _end(tasks: "set[asyncio.Task[None]] | list[asyncio.Task[Outcome]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _make_shard(job: Job, tools: Tools, index: int, rows: list[Row]) -> None:
    # the spool has no name; it lies on the workspace's disk where that is local
    with advice(job.group), tempfile.TemporaryFile(dir=job.workspace.store.local) as spool:
        found: dict[str, Outcome] = {}
        for _ in range(CHANCES):
            await _fetch_rows(job, tools, [row for row in rows if row["url_key"] not in found], spool, found)
        for row in (row for row in rows if row["url_key"] not in found):
            found[row["url_key"]] = given_up(row, "stuck")
            job.done(row, found[row["url_key"]])
        outcomes = [found[row["url_key"]] for row in rows]
        await asyncio.to_thread(_publish, job, index, outcomes, spool, tools.client.rests())  # the others' shards go on


async def _fetch_rows(job: Job, tools: Tools, rows: list[Row], spool: IO[bytes], found: dict[str, Outcome]) -> None:
    """Puts the outcomes of `rows` into `found`; ends early, with some missing, where they don't move any more."""
    watch, under_way = Watch(), tools.client.under_way

    async def one(row: Row) -> Outcome:
        try:
            found[row["url_key"]] = outcome = await fetch_one(tools, row, spool)
        finally:
            under_way.pop(asyncio.current_task(), None)
        watch.touch()
        job.done(row, outcome)
        return outcome

    tasks = [asyncio.create_task(one(row)) for row in rows]
    left = set(tasks)
    try:
        while left and not watch.stuck(tasks, under_way, job.fetch.stuck_s):
            ended, left = await asyncio.wait(left, timeout=job.fetch.stuck_s / 4, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
    finally:
        await _end(tasks)


def _publish(job: Job, index: int, outcomes: list[Outcome], spool: IO[bytes], rests: dict[str, float]) -> None:
    """What hosts said, for whoever comes after a kill; ledger part, then tar, then table."""
    store = job.workspace.store
    if rests:
        save_rests(store, rests)
    if met := [row["url_key"] for row, *_ in outcomes if row["reason"] == "forgotten" and row["sha256"]]:
        job.workspace.bury("url_key", met, "with its bytes")  # the takedown that follows empties these rows
    table = pa.Table.from_pylist([outcome.ledger for outcome in outcomes], schema=LEDGER)
    part = ledger.ledger_part(job.group, job.increment, index)
    store.write_table(part, table)
    ref = ShardRef(f"pairs/{job.group}/{job.increment}", index)
    try:
        write_shard(store, ref, _read_spool(outcomes, spool), PAIRS)
    except BaseException:  # a full disk: nothing of the shard is there then
        store.delete(part)
        raise


def _read_spool(outcomes: list[Outcome], spool: IO[bytes]) -> Iterator[tuple[Row, bytes]]:
    for outcome in outcomes:
        if outcome.pair is not None:
            spool.seek(outcome.place[0])
            yield outcome.pair, spool.read(outcome.place[1])
