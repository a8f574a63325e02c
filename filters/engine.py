"""The engine: what is left to score, and the loop that scores it, shard by shard, inline or on Ray.

A shard is read once and each of its images decoded at most once, however many filters look at it. The rows pass in
windows, whose length is the least common multiple of the filters' batch sizes: so every filter's batches start at
multiples of its own batch size, whatever else runs beside it, and memory holds one window of pixels, not a
shard's. One table per filter and shard; a table that exists is never made again.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
import pyarrow as pa

from cluster.compute import Engine, map_shards
from filters.base import PIXELS, Batch, Filter, fingerprint_of, needed_filters, pair_fields
from filters.columns import check_same_pairs
from filters.measure import FilterStats, measure
from pairs.errors import PairmillError
from pairs.shard import Shard, ShardRef, read_shard
from pairs.store import Store
from pairs.strict import nearest
from pairs.workspace import alive

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
    """What a run of the engine did. `undecodable` counts images that no filter could look at."""

    shards: int = 0
    decoded: int = 0
    undecodable: int = 0
    decode_s: float = 0.0
    filters: dict[str, FilterStats] = field(default_factory=dict)

    def add(self, other: "Stats") -> None:
        self.shards += other.shards
        self.decoded += other.decoded
        self.undecodable += other.undecodable
        self.decode_s += other.decode_s
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
) -> Stats:
    """Makes every missing table of the planned filters for the `shards`; engine and workers don't change the bytes.

    `progress(done, all)` is called after each shard; `dead` are tombstones, whose rows become null. Canary shards are
    shards like any other.
    """
    left = missing(store, planned, shards)
    total = Stats()
    if not left:
        return total
    items = [(ref, [one.name for one in filters]) for ref, filters in left.items()]
    score = partial(_score_shard, store, list(planned), dead or {})
    for done, stats in enumerate(map_shards(score, items, engine=engine, workers=workers), start=1):
        total.add(stats)
        if progress:
            progress(done, len(items))
    return total


def _score_shard(store: Store, planned: list[PlannedFilter], dead: Dead, item: tuple[ShardRef, list[str]]) -> Stats:
    """Scores one shard with the filters named in `item`, and writes their tables."""
    ref, names = item
    filters = [one for one in planned if one.name in names]
    wants_pixels = any(PIXELS in one.filter.needs for one in filters)
    shard = read_shard(store, ref) if wants_pixels else Shard(ref, store.read_table(ref.table), b"")
    stats = Stats(shards=1, filters={one.name: FilterStats() for one in filters})
    columns = _needed_columns(store, planned, filters, shard)
    made = {one.name: [pa.schema(list(one.filter.columns.items())).empty_table()] for one in filters}
    wanted = {need for one in filters for need in one.filter.needs}
    living = alive(shard.table, dead).to_pylist()
    window = math.lcm(*(one.filter.batch_size for one in filters))
    for start in range(0, shard.table.num_rows, window):
        rows = [i for i in range(start, min(start + window, shard.table.num_rows)) if living[i]]
        pixels = _decode(shard, rows, stats) if wants_pixels else {}
        for one in filters:
            table = _score_window(one, shard, columns, pixels, rows, stats.filters[one.name])
            made[one.name].append(table)
            for column in (name for name in table.column_names if f"{one.name}.{name}" in wanted):
                whole = columns.setdefault(f"{one.name}.{column}", [None] * shard.table.num_rows)
                for i, value in zip(rows, table[column].to_pylist(), strict=True):
                    whole[i] = value
    for one in filters:
        _refuse_if_all_failed(one, ref, stats.filters[one.name])
        _write(store, one, shard, living, pa.concat_tables(made[one.name]))
    return stats


def _needed_columns(
    store: Store, planned: list[PlannedFilter], filters: list[PlannedFilter], shard: Shard
) -> dict[str, list[object]]:
    """Whole columns of the shard by name: pair fields, and what filters made in earlier runs."""
    fields = {need for one in filters for need in pair_fields(one.filter)}
    columns = {name: shard.table[name].to_pylist() for name in sorted(fields)}
    running = {one.name for one in filters}
    for one in planned:
        needed = sorted({n for other in filters for n in other.filter.needs if n.partition(".")[0] == one.name})
        if not needed or one.name in running:
            continue
        path = shard.ref.beside(one.folder)
        table = store.read_table(path, ["uid", *(need.partition(".")[2] for need in needed)])
        check_same_pairs(shard.ref, shard.table["uid"], table, path)
        columns |= {need: table[need.partition(".")[2]].to_pylist() for need in needed}
    return columns


def _decode(shard: Shard, rows: Sequence[int], stats: Stats) -> dict[int, np.ndarray | None]:
    """Row → HxWx3 uint8 RGB, or None where the image doesn't decode."""
    started = time.perf_counter()
    offsets, sizes = (shard.table[name].to_pylist() for name in ("image_offset", "image_size"))
    pixels: dict[int, np.ndarray | None] = {}
    for i in rows:
        try:
            encoded = np.frombuffer(shard.tar, np.uint8, sizes[i], offsets[i])
            bgr = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except (cv2.error, ValueError):
            bgr = None
        pixels[i] = None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        stats.undecodable += bgr is None
    stats.decoded += len(rows)
    stats.decode_s += time.perf_counter() - started
    return pixels


def _score_window(
    one: PlannedFilter,
    shard: Shard,
    columns: Mapping[str, list[object]],
    pixels: Mapping[int, np.ndarray | None],
    rows: Sequence[int],
    stats: FilterStats,
) -> pa.Table:
    """The filter's columns for `rows`. Batches are cut at fixed positions of the shard, so that a forgotten pair
    changes no other pair's batch."""
    uids = shard.table["uid"].to_pylist()
    names = [need for need in one.filter.needs if need != PIXELS]
    batches: dict[int, list[int]] = {}
    for i in rows:
        batches.setdefault(i // one.filter.batch_size, []).append(i)
    tables = []
    for members in batches.values():
        values = {name: [columns[name][i] for i in members] for name in names}
        looks = [pixels[i] for i in members] if PIXELS in one.filter.needs else []
        tables.append(measure(one.filter, Batch([uids[i] for i in members], values, looks), stats))
    return pa.concat_tables(tables) if tables else pa.schema(list(one.filter.columns.items())).empty_table()


def _refuse_if_all_failed(one: PlannedFilter, ref: ShardRef, stats: FilterStats) -> None:
    failed = sum(stats.errors.values())
    if failed == stats.pairs and failed >= 16:
        reason = stats.errors.most_common(1)[0][0]
        raise PairmillError(
            expected=f"filter {one.name} to measure at least one of {failed} pairs of {ref.table}",
            found=f"an error at every one: {reason}",
            remedy="mend the filter or its settings, then run the same command again",
        )


def _write(store: Store, one: PlannedFilter, shard: Shard, living: Sequence[bool], made: pa.Table) -> None:
    places = iter(range(made.num_rows))
    positions = pa.array([next(places) if there else None for there in living], pa.int64())
    table = made.combine_chunks().take(positions).add_column(0, "uid", shard.table["uid"].combine_chunks())
    metadata = {"filter": one.name, "fingerprint": one.fingerprint, "rows": str(table.num_rows)}
    store.write_table(shard.ref.beside(one.folder), table, metadata)
