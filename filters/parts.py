"""What a reducer works on: the shards' columns, read shard by shard on the workers, and a place to spill rows to.

A `Part` is one shard's columns, not read yet; it travels to a worker, which reads and condenses it, so that texts and
embeddings never meet in one process. Small corpora stay in this process: starting Ray takes longer. Results come back
in the order of the parts, so the number of workers changes no byte.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from cluster.compute import Engine, map_shards
from cluster.session import ray_session
from filters.columns import OWN, load_frame
from filters.leaders import leading
from pairs.shard import ShardRef, cuts
from pairs.store import Store

if TYPE_CHECKING:
    from filters.base import Reducer

Item = TypeVar("Item")
Result = TypeVar("Result")
SPREAD_BYTES = 64 << 20  # of pair tables, about 200,000 pairs: below it a reducer stays in this process


@dataclass(frozen=True)
class Part:
    """The columns of one shard: `CORPUS` and what the reducer needs (`columns`: its name → the full name).

    Rows that aren't alive are null. With `made`, the columns that the reducer has made, only rows that answers depend
    on are given: those that lead a group, dead ones too, and members of the groups that `without` leads.
    """

    store: Store
    source: str
    ref: ShardRef
    columns: Mapping[str, str]
    scores: Mapping[str, str]
    trusted: frozenset[str]
    made: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    def load(self) -> pa.Table:
        """The rows, with their increment and whether they are trusted."""
        frame = load_frame(self.store, {self.source: [self.ref]}, self.columns.values(), self.scores, self.trusted)
        count = frame.table.num_rows
        columns = {"uid": frame.table["uid"], "source": pa.array(np.full(count, self.source, object), pa.string())}
        columns |= {"increment": pa.array(cuts(self.store, self.ref, count), pa.string())}
        columns |= {"trusted": pa.array(frame.trusted)}
        rows = pa.array(np.arange(count), mask=None if self.made else ~frame.alive)
        table = pa.table(columns | {name: frame.table[full].take(rows) for name, full in self.columns.items()})
        return leading(table, self.groups, self.without) if self.groups else table


def parts(
    store: Store,
    reducer: "Reducer",
    shards: Mapping[str, Sequence[ShardRef]],
    scores: Mapping[str, str],
    trusted: Collection[str],
    own: str = "",
    without: Collection[str] = (),
) -> list[Part]:
    """The parts of all shards, by increment; with `own` also the columns made under that name."""
    full = {need: need if "." in need else f"{OWN}.{need}" for need in reducer.needs}
    made = tuple(reducer.columns) if own else ()
    full |= {column: f"{own}.{column}" for column in made}
    groups = tuple(name for name in made if pa.types.is_string(reducer.columns[name]))
    used = {name: scores[name] for name in {one.partition(".")[0] for one in full.values()} if name in scores}
    order = sorted(((source, ref) for source, refs in shards.items() for ref in refs), key=lambda s: s[1].increment)
    trusts, left_out = frozenset(trusted), frozenset(without)
    return [Part(store, source, ref, full, used, trusts, made, groups, left_out) for source, ref in order]


@dataclass(frozen=True)
class Work:
    """How a reducer works: `folder` of the store is its own, `batch` the place of what it answers in `order.json`; a
    small corpus stays in this process, whatever the engine."""

    store: Store
    folder: str
    batch: int = 0
    engine: Engine = "inline"
    workers: int = 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function(item)` of each, in order. Both have to pickle."""
        numbered, places = partial(_numbered, function), list(enumerate(items))
        found = map_shards(numbered, places, engine=self.engine, workers=self.workers)
        return [result for _, result in sorted(found, key=lambda one: one[0])]

    @contextlib.contextmanager
    def spread(self, shards: Iterable[ShardRef]) -> Iterator["Work"]:
        """The same on one Ray session, or in this process where the shards aren't worth it."""
        if self.engine == "inline" or sum(self.store.size(ref.table) for ref in shards) < SPREAD_BYTES:
            yield replace(self, engine="inline")
            return
        with ray_session(self.workers):
            yield self

    def table(self, reducer: "Reducer", some: Sequence[Part]) -> pa.Table:
        """The condensed rows of the parts, one part below the other."""
        found = self.map(partial(_condensed, reducer), some)
        return pa.concat_tables([table.cast(found[0].schema) for table in found])


def _numbered(function: Callable[[Any], Any], item: tuple[int, Any]) -> tuple[int, Any]:
    return item[0], function(item[1])


def _condensed(reducer: "Reducer", part: Part) -> pa.Table:
    return reducer.condense(part.load())


def nothing(reducer: "Reducer", like: pa.Table, own: bool) -> pa.Table:
    """A table without rows: the columns of `like`, and with `own` those that the reducer makes."""
    empty = like.slice(0, 0)
    for name, kind in reducer.columns.items() if own else ():
        empty = empty.append_column(name, pa.array([], kind))
    return empty
