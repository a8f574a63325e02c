"""Columns of many shards side by side: what rules and reducers read, by position, with the uids compared.

A column is `<filter>.<column>` (a score table) or `pairs.<field>` (the pair table itself). Only what is asked for is
read. Rows that are forgotten or have a tombstone keep their place and are not `alive`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairs.errors import PairmillError
from pairs.identity import held_out
from pairs.schemas import PAIRS
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.strict import nearest
from pairs.workspace import Workspace, alive

OWN = "pairs"  # the prefix of the pair table's own fields


@dataclass(frozen=True)
class Frame:
    """Rows of all `shards`, one shard after another. `starts` has one entry more than there are shards."""

    shards: list[tuple[str, ShardRef]]  # source, shard
    starts: np.ndarray
    table: pa.Table  # uid and the columns asked for, by their full names
    source: np.ndarray  # object
    trusted: np.ndarray
    alive: np.ndarray
    held_out: np.ndarray  # trusted pairs that only evaluate

    def rows(self, place: int) -> slice:
        """The rows of the shard at `place`."""
        return slice(int(self.starts[place]), int(self.starts[place + 1]))


def load_frame(
    store: Store,
    shards: Mapping[str, Sequence[ShardRef]],
    names: Iterable[str],
    scores: Mapping[str, str],
    trusted: Iterable[str],
) -> Frame:
    """The columns `names` of the shards of each source; `scores` maps a filter's name to `scores/<name>-<fp>`."""
    order = sorted(((source, ref) for source, refs in shards.items() for ref in refs), key=lambda s: s[1].increment)
    wanted = list(dict.fromkeys(names))
    dead = Workspace(store).tombstones()
    parts = [read_columns(store, ref, wanted, scores) for _, ref in order]
    counts = [part.num_rows for part in parts]
    empty = dict.fromkeys(("uid", "url_key", "status"), pa.array([], pa.string())) | dict.fromkeys(wanted, pa.nulls(0))
    nothing = pa.table(empty)
    table = pa.concat_tables([part.cast(parts[0].schema) for part in parts]) if parts else nothing
    source = np.repeat(np.array([name for name, _ in order], object), counts)
    trusts = np.repeat(np.array([name in set(trusted) for name, _ in order], bool), counts)
    uids = table["uid"].to_pylist() if trusts.any() else []
    held = np.zeros(table.num_rows, bool)
    held[trusts] = [held_out(uids[row]) if uids[row] else False for row in np.flatnonzero(trusts)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    living = as_bool(alive(table, dead))
    return Frame(order, starts, table.drop_columns(["url_key", "status"]), source, trusts, living, held)


def as_bool(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A boolean column as numpy, null as False."""
    return pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(bool)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def list_lengths(lists: pa.Array) -> np.ndarray:
    """How many values each list holds, int64; 0 where it is null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def read_columns(
    store: Store,
    ref: ShardRef,
    names: Sequence[str],
    scores: Mapping[str, str],
    fields: Sequence[str] = ("uid", "url_key", "status"),
) -> pa.Table:
    """The pair table's `fields` by their own names and the columns `names` of one shard."""
    own = [name.partition(".")[2] for name in names if name.startswith(f"{OWN}.")]
    check_columns([f"{OWN}.{field}" for field in own], [])
    pair = store.read_table(ref.table, list(dict.fromkeys([*fields, *own])))
    table = pair.select(list(fields))
    made = {f"{OWN}.{field}": pair[field] for field in own}
    for filter_name in dict.fromkeys(name.partition(".")[0] for name in names if not name.startswith(f"{OWN}.")):
        made |= _scores(store, ref, filter_name, names, scores, pair["uid"])
    for name in names:
        table = table.append_column(name, made[name])
    return table.replace_schema_metadata(None)


def _scores(
    store: Store, ref: ShardRef, filter_name: str, names: Sequence[str], scores: Mapping[str, str], uid: pa.ChunkedArray
) -> dict[str, pa.ChunkedArray]:
    """The columns among `names` that `filter_name` made for a shard, by full name."""
    wanted = [name for name in names if name.partition(".")[0] == filter_name]
    if filter_name not in scores:
        raise _unknown(wanted[0], [f"{name}.…" for name in scores])
    path = ref.beside(scores[filter_name])
    if not store.has(path):
        raise PairmillError(expected=f"scores at {path}", found="no such table", remedy="run `pairmill curate` first")
    columns = [name.partition(".")[2] for name in wanted]
    try:
        table = store.read_table(path, ["uid", *columns])
    except PairmillError:
        made = store.read_table(path).column_names
        check_columns(wanted, [f"{filter_name}.{column}" for column in made if column != "uid"])
        raise
    check_same_pairs(ref, uid, table, path)
    return {name: table[name.partition(".")[2]] for name in wanted}


def check_same_pairs(ref: ShardRef, uid: pa.ChunkedArray, table: pa.Table, path: str) -> None:
    """Row i of `table` is the pair `uid[i]` of the shard, or the user is told which table isn't the shard's."""
    if table.num_rows != len(uid) or pc.any(pc.not_equal(table["uid"], uid)).as_py():  # a forgotten pair's null is none
        raise PairmillError(
            expected=f"the uids of {ref.table} in {path}, in the same order",
            found="others",
            remedy=f"delete {path}, then run the same command again; it is made anew",
        )


def check_columns(names: Iterable[str], made: Iterable[str]) -> None:
    """Each of `names` is among the columns `made` (`<filter>.<column>`) or a field of the pair table; the user is told
    the nearest one otherwise."""
    choices = [*made, *(f"{OWN}.{field}" for field in PAIRS.names)]
    for name in names:
        if name not in choices:
            raise _unknown(name, choices)


def _unknown(name: str, choices: list[str]) -> PairmillError:
    return PairmillError(
        expected=f"a column that a filter or reducer of the recipe makes, where {name!r} stands",
        found="none of that name",
        remedy=nearest(name, choices),
    )
