"""The engine: what is left to score, and the loop that scores it, shard by shard, inline or on Ray.

A shard is read once and each of its images decoded at most once, however many filters look at it, ahead of models.
Each filter takes a batch as soon as its rows are decoded and measured by those it needs; batches start at multiples of
its own batch size, whatever else runs beside it, so memory holds about two of the longest batches of pixels, not a
shard's. One table per filter and shard; a table that exists is never made again.

A shard that kills its process twice is scored under a guard (`cluster/guard.py`): the pairs at fault become null, the
table's metadata say why (`errors`: rows by reason), and the run goes on. A process that runs inline dies of it once,
and leaves a mark in `scoring/`; the same command then begins that shard under the guard.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from cluster.compute import Engine, map_shards
from cluster.guard import Crashed, Guard
from filters.base import PIXELS, Batch, Filter, fingerprint_of, needed_filters, pair_fields
from filters.columns import check_same_pairs
from filters.images import Pixels, decoded
from filters.measure import Ask, FilterStats, empty, here, measure
from filters.score_tables import values_of, write_scores
from pairs.errors import PairmillError
from pairs.shard import Shard, ShardRef, read_shard
from pairs.store import Store
from pairs.strict import nearest
from pairs.workspace import alive

SCORING = "scoring"  # marks of shards that an inline process is at
Dead = Mapping[str, AbstractSet[str]]  # tombstoned ids by kind, as `Workspace.tombstones` gives them


@dataclass(frozen=True)
class PlannedFilter:
    """A filter that is to run, under the name that others need it by."""

    name: str
    filter: Filter
    fingerprint: str

    @property
    def folder(self) -> str:
        """Where its tables lie."""
        return f"scores/{self.name}-{self.fingerprint}"


@dataclass
class Stats:
    """What a run of the engine did. `undecodable` counts images that no filter could look at, `crashes` those of them
    that killed the decoder; `waited_s` is how long models waited for images."""

    shards: int = 0
    decoded: int = 0
    undecodable: int = 0
    decode_s: float = 0.0
    waited_s: float = 0.0
    crashes: Counter[str] = field(default_factory=Counter)
    filters: dict[str, FilterStats] = field(default_factory=dict)

    def add(self, other: "Stats") -> None:
        for name in ("shards", "decoded", "undecodable", "decode_s", "waited_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.crashes += other.crashes
        for name, stats in other.filters.items():
            self.filters.setdefault(name, FilterStats()).add(stats)


def plan(filters: Mapping[str, Filter]) -> list[PlannedFilter]:
    """The filters with their fingerprints, each after those whose columns it needs."""
    done: dict[str, PlannedFilter] = {}
    waiting = dict(filters)
    while waiting:
        ready = [name for name, one in waiting.items() if all(need not in waiting for need in needed_filters(one))]
        if not ready:
            raise PairmillError(
                expected="filters that don't need one another in a circle",
                found=", ".join(sorted(waiting)),
                remedy="take one of them out of the recipe",
            )
        for name in ready:
            one = waiting.pop(name)
            _check_needs(name, one, filters)
            needed = {need: done[need].fingerprint for need in needed_filters(one)}
            done[name] = PlannedFilter(name, one, fingerprint_of(name, one, needed))
    return list(done.values())


def _check_needs(name: str, one: Filter, filters: Mapping[str, Filter]) -> None:
    pair_fields(one)
    made = [f"{maker}.{column}" for maker, filter_ in filters.items() for column in filter_.columns]
    for need in one.needs:
        if "." in need and need not in made:
            raise PairmillError(
                expected=f"a column {need}, which filter {name} needs", found="no filter that makes it",
                remedy=nearest(need, made) if made else f"add {need.partition('.')[0]} to the recipe's filters",
            )  # fmt: skip


def missing(
    store: Store, planned: Sequence[PlannedFilter], shards: Iterable[ShardRef]
) -> dict[ShardRef, list[PlannedFilter]]:
    """The filters whose tables are missing, for each shard that lacks any; one listing per filter."""
    there = {one.name: set(store.files(one.folder, ".parquet")) for one in planned}
    left = {ref: [one for one in planned if ref.beside(one.folder) not in there[one.name]] for ref in shards}
    return {ref: filters for ref, filters in left.items() if filters}


def score_shards(
    store: Store,
    planned: Sequence[PlannedFilter],
    shards: Iterable[ShardRef],
    *,
    engine: Engine,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    dead: Dead | None = None,
    guard: Guard | None = None,
) -> Stats:
    """Makes every missing table of the planned filters for the `shards`; engine and workers don't change the bytes.

    `progress(done, all)` is called after each shard; `dead` are tombstones, whose rows become null. Shards that lack no
    filter with a GPU are scored first, by workers that hold none. With `guard` its process scores, not the engine.
    """
    left, done, total = missing(store, planned, shards), 0, Stats()
    given = (store, list(planned), dead or {})
    for group in _by_gpu(left):
        gpu = max(one.filter.gpu for filters in group.values() for one in filters)
        items = [(ref, [one.name for one in filters]) for ref, filters in group.items()]
        score = partial(_marked if engine == "inline" else _score_shard, *given)
        rescue, apart = partial(_guarded, *given), partial(_apart, guard, *given) if guard else None
        spread = map_shards(score, items, engine=engine, workers=workers, gpu=gpu, rescue=rescue)
        for stats in map(apart, items) if apart else spread:
            total.add(stats)
            done += 1
            if progress:
                progress(done, len(left))
    return total


Left = Mapping[ShardRef, list[PlannedFilter]]
Item = tuple[ShardRef, list[str]]


def _by_gpu(left: Left) -> list[Left]:
    """The shards that need no GPU, and those that do."""
    parts = ({ref: f for ref, f in left.items() if any(one.filter.gpu for one in f) is g} for g in (False, True))
    return [part for part in parts if part]


def _marked(store: Store, planned: list[PlannedFilter], dead: Dead, item: Item) -> Stats:
    """Scores a shard inline. A mark that is there already was left by a process that died at this shard."""
    mark = item[0].beside(SCORING).removesuffix(".parquet")
    suspect = store.has(mark)
    store.write(mark, "")
    try:
        return (_guarded if suspect else _score_shard)(store, planned, dead, item)
    finally:
        store.delete(mark)


def _apart(guard: Guard, store: Store, planned: list[PlannedFilter], dead: Dead, item: Item) -> Stats:
    """Scores a shard in the guard's process at one go, and batch by batch where that dies of it."""
    try:
        return guard.ask(_score_shard, store, planned, dead, item)
    except Crashed:
        return _score_shard(store, planned, dead, item, guard.ask)


def _guarded(store: Store, planned: list[PlannedFilter], dead: Dead, item: Item) -> Stats:
    with Guard() as guard:
        return _score_shard(store, planned, dead, item, guard.ask)


@dataclass
class _Pass:
    """A filter on its way over a shard: the rows behind it, their tables, and why rows failed."""

    one: PlannedFilter
    done: int = 0
    tables: list[pa.Table] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


def _score_shard(store: Store, planned: list[PlannedFilter], dead: Dead, item: Item, ask: Ask = here) -> Stats:
    """Scores one shard with the filters named in `item`, and writes their tables."""
    ref, names = item
    filters = [one for one in planned if one.name in names]
    looking = [one for one in filters if PIXELS in one.filter.needs]
    shard = read_shard(store, ref) if looking else Shard(ref, store.read_table(ref.table), b"")
    stats = Stats(shards=1, filters={one.name: FilterStats() for one in filters})
    columns = {"uid": shard.table["uid"].to_pylist()} | _needed_columns(store, planned, filters, shard)
    living = alive(shard.table, dead).to_pylist()
    passes = {one.name: _Pass(one) for one in filters}
    pixels: Pixels = {}
    for seen in _images(shard, living, looking, pixels, passes, stats, ask):
        for at in passes.values():
            _advance(at, passes, columns, pixels, living, seen, stats.filters[at.one.name], ask)
        for row in range(min(pixels, default=0), min((passes[one.name].done for one in looking), default=0)):
            pixels.pop(row, None)
    for at in passes.values():
        _refuse_if_all_failed(at.one, ref, stats.filters[at.one.name])
        table = pa.concat_tables([empty(at.one.filter), *at.tables])
        write_scores(store, ref, at.one.folder, shard.table["uid"], living, table, at.failed)
    return stats


def _images(
    shard: Shard,
    living: Sequence[bool],
    looking: Sequence[PlannedFilter],
    pixels: Pixels,
    passes: Mapping[str, _Pass],
    stats: Stats,
    ask: Ask,
) -> Iterator[int]:
    """Puts decoded images into `pixels`, a chunk at a time; yields how many rows are ready, at last all of them."""
    rows = [row for row, there in enumerate(living) if there] if looking else []
    ahead = max((one.filter.batch_size for one in looking if one.filter.gpu), default=0)
    asked = time.perf_counter()
    for chunk in decoded(shard, rows, ahead, ask):
        stats.waited_s += time.perf_counter() - asked if ahead else 0.0
        stats.decoded += len(chunk.pixels)
        stats.undecodable += sum(image is None for image in chunk.pixels.values())
        stats.crashes.update(chunk.failed.values())
        stats.decode_s += chunk.seconds
        pixels |= chunk.pixels
        for one in looking:
            passes[one.name].failed |= {row: f"{why} while decoding" for row, why in chunk.failed.items()}
        if (ready := max(chunk.pixels) + 1) <= rows[-1]:
            yield ready
        asked = time.perf_counter()
    yield len(living)


def _advance(
    at: _Pass,
    passes: Mapping[str, _Pass],
    columns: dict[str, list[Any]],
    pixels: Pixels,
    living: Sequence[bool],
    seen: int,
    stats: FilterStats,
    ask: Ask,
) -> None:
    """Measures the batches that are ready. They are cut at fixed positions of the shard, so that a forgotten pair
    changes no other pair's batch."""
    filter_, size = at.one.filter, at.one.filter.batch_size
    ready = [passes[name].done for name in needed_filters(filter_) if name in passes]
    limit = min([seen if PIXELS in filter_.needs else len(living), *ready])
    while at.done < limit and (at.done + size <= limit or limit == len(living)):
        rows = [row for row in range(at.done, min(at.done + size, limit)) if living[row]]
        at.done = min(at.done + size, limit)
        if not rows:
            continue
        needs = {name: [columns[name][row] for row in rows] for name in filter_.needs if name != PIXELS}
        looks = [pixels[row] for row in rows] if PIXELS in filter_.needs else []
        table, failed = measure(filter_, Batch([columns["uid"][row] for row in rows], needs, looks), stats, ask)
        at.tables.append(table)
        at.failed |= {rows[place]: why for place, why in failed.items()}
        for column in (name for name in table.column_names if f"{at.one.name}.{name}" in columns):
            for row, value in zip(rows, values_of(table[column]), strict=True):
                columns[f"{at.one.name}.{column}"][row] = value


def _needed_columns(
    store: Store, planned: list[PlannedFilter], filters: list[PlannedFilter], shard: Shard
) -> dict[str, list[Any]]:
    """Whole columns of the shard by name: pair fields, what filters made in earlier runs, and room for what is made
    in this one."""
    wanted = sorted({need for one in filters for need in one.filter.needs if need != PIXELS})
    running = {one.name for one in filters}
    columns = {name: [] if "." in name else shard.table[name].to_pylist() for name in wanted}
    for one in planned:
        needed = [need for need in wanted if need.partition(".")[0] == one.name]
        if one.name in running:
            columns |= {need: [None] * shard.table.num_rows for need in needed}
        elif needed:
            path = shard.ref.beside(one.folder)
            table = store.read_table(path, ["uid", *(need.partition(".")[2] for need in needed)])
            check_same_pairs(shard.ref, shard.table["uid"], table, path)
            columns |= {need: values_of(table[need.partition(".")[2]]) for need in needed}
    return columns


def _refuse_if_all_failed(one: PlannedFilter, ref: ShardRef, stats: FilterStats) -> None:
    failed = sum(stats.errors.values())
    if failed == stats.pairs and failed >= 16:
        reason = stats.errors.most_common(1)[0][0]
        raise PairmillError(
            expected=f"filter {one.name} to measure at least one of {failed} pairs of {ref.table}",
            found=f"an error at every one: {reason}",
            remedy="mend the filter or its settings, then run the same command again",
        )
