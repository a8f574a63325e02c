"""A filter's table of a shard: row i is the shard's pair i, null where it is forgotten or couldn't be measured.

Its metadata tell `nulls` (by column, among living pairs) and `errors` (rows by reason), so that whoever has the tables
can say what happened, whichever run made them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters.columns import one_chunk
from pairs.shard import ShardRef
from pairs.store import Store, table_metadata

MADE_WITH = "made_with.json"  # in a folder of score tables: hashes of the model or the list that made them


def write_scores(
    store: Store, ref: ShardRef, folder: str, uids: pa.ChunkedArray, living: Sequence[bool], made: pa.Table,
    failed: Mapping[int, str],
) -> None:  # fmt: skip
    """Publishes the rows `made` of the living pairs below `folder` (`scores/<filter>-<fingerprint>`); `failed` says why
    rows of the shard couldn't be measured."""
    places = iter(range(made.num_rows))
    positions = pa.array([next(places) if there else None for there in living], pa.int64())
    table = made.combine_chunks().take(positions).add_column(0, "uid", uids.combine_chunks())
    name, _, fingerprint = folder.rpartition("/")[2].rpartition("-")
    metadata = {"filter": name, "fingerprint": fingerprint, "rows": str(table.num_rows)}
    store.write_table(ref.beside(folder), table, metadata | _told(made, failed))


def _told(living: pa.Table, failed: Mapping[int, str]) -> dict[str, str]:
    """`nulls` and `errors`, as far as there are any."""
    errors = {why: [row for row in sorted(failed) if failed[row] == why] for why in sorted(set(failed.values()))}
    nulls = {column: living[column].null_count for column in living.column_names if living[column].null_count}
    return {key: json.dumps(facts) for key, facts in (("nulls", nulls), ("errors", errors)) if facts}


def without_errors(metadata: Mapping[str, str], gone: AbstractSet[int]) -> dict[str, str]:
    """A table's metadata without errors of the rows `gone`, nor a reason that was theirs alone: it may quote them."""
    errors = {why: [row for row in rows if row not in gone] for why, rows in _errors(metadata).items()}
    left = {why: rows for why, rows in errors.items() if rows}
    told = {key: value for key, value in metadata.items() if key != "errors"}
    return told | ({"errors": json.dumps(left)} if left else {})


def merged_facts(
    tables: Sequence[pa.Table], merged: pa.Table, rows: Sequence[int], living: Sequence[bool]
) -> dict[str, str]:
    """The metadata of `merged`, which holds the `rows` of score or selection tables that stand one below the other, of
    pairs that are `living` or not; no facts where the tables have none."""
    facts, starts = table_metadata(tables[0]), np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
    errors = [(start, _errors(table_metadata(one))) for start, one in zip(starts, tables, strict=False)]
    failed = {start + row: why for start, told in errors for why, at in told.items() for row in at}
    counted = {name for one in tables for name in json.loads(table_metadata(one).get("nulls", "{}"))}
    alive = merged.select([name for name in merged.column_names if name in counted]).filter(pa.array(living))
    kept = {key: facts[key] for key in ("filter", "fingerprint", "rows") if key in facts}
    kept |= {"rows": str(len(rows))} if kept else {}
    return kept | _told(alive, {place: failed[row] for place, row in enumerate(rows) if row in failed})


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """What a filter is given of a column, row by row: a vector of fp16 as a numpy array, all else as Python has it."""
    if column.type != pa.list_(pa.float16()):
        return list(column.to_pylist())
    lists = one_chunk(column)
    flat, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return [
        flat[start:end] if there else None
        for start, end, there in zip(ends, ends[1:], lists.is_valid().to_pylist(), strict=False)
    ]


def errors_of(schema: pa.Schema) -> dict[str, list[int]]:
    """Why rows of a score table couldn't be measured: reason → rows."""
    return _errors({key.decode(): value.decode() for key, value in (schema.metadata or {}).items()})


def _errors(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    return dict(json.loads(metadata.get("errors", "{}")))


def told_by_tables(store: Store, folder: str, shards: Iterable[ShardRef]) -> tuple[int, Counter[str], Counter[str]]:
    """Rows, nulls by column (of living pairs) and errors by reason of a filter's tables; reads only their footers."""
    rows, nulls, errors = 0, Counter[str](), Counter[str]()
    for ref in shards:
        with store.fs.open(store.full(ref.beside(folder))) as file:
            schema = pq.read_schema(file)
        facts = schema.metadata or {}
        rows += int(facts.get(b"rows", 0))
        nulls.update(json.loads(facts.get(b"nulls", b"{}")))
        errors.update({why: len(at) for why, at in errors_of(schema).items()})
    return rows, nulls, errors
