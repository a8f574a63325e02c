"""Runs the reducers over what is new: an increment after the other, one table per shard beside the filters' scores.

`order.json` beside a reducer's tables lists the batches that were reduced together, and is written before their
tables: a batch that was cut short is reduced again against the batches before it, so its answers are those of a
run that was never killed. Earlier tables are read, never written. Memory: the needed columns of all shards.
"""

import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from filters.base import CORPUS, Reducer, fingerprint_of, needed_filters
from filters.columns import OWN, Frame, load_frame
from pairs.shard import ShardRef, cuts
from pairs.store import Store

Shards = Mapping[str, Sequence[ShardRef]]  # by source


def reducer_folder(
    name: str, reducer: Reducer, scores: Mapping[str, str], shards: Shards, trusted: Collection[str]
) -> str:
    """`scores/<reducer>-<fingerprint>`; the fingerprint covers the needed columns' own, the sources with their fetch
    fingerprints and which of them are trusted: answers depend on who else is asked, not on which recipe ran before."""
    needed = {need: scores[need].rsplit("-", 1)[1] for need in needed_filters(reducer) if need in scores}
    needed |= {f"source {name}": " ".join(sorted({ref.group for ref in refs})) for name, refs in shards.items()}
    needed |= {"trusted sources": " ".join(sorted(set(trusted) & set(shards)))}
    return f"scores/{name}-{fingerprint_of(name, reducer, needed)}"


def run_reducers(
    store: Store, reducers: Mapping[str, Reducer], shards: Shards, scores: Mapping[str, str], trusted: Collection[str]
) -> dict[str, str]:
    """Makes what tables are missing. Returns the folder of each reducer's tables, in the form of `scores`."""
    folders: dict[str, str] = {}
    for name, reducer in reducers.items():
        known = {**scores, **folders}
        folders[name] = reducer_folder(name, reducer, known, shards, trusted)
        _run(store, name, reducer, shards, known | {name: folders[name]}, trusted)
    return folders


def _run(
    store: Store, name: str, reducer: Reducer, shards: Shards, scores: Mapping[str, str], trusted: Collection[str]
) -> None:
    folder = scores[name]
    source_of = {ref: source for source, refs in shards.items() for ref in refs}
    there = set(store.files(folder, ".parquet"))
    if all(ref.beside(folder) in there for ref in source_of):
        return
    batches = _batches(store, f"{folder}/order.json", sorted(source_of))
    for place, batch in enumerate(batches):
        left = [ref for ref in batch if ref.beside(folder) not in there]
        if left:
            before = [ref for earlier in batches[:place] for ref in earlier]
            parts = (_by_source(before, source_of), _by_source(batch, source_of))
            _reduce(store, name, reducer, parts, left, scores, trusted)


def _reduce(
    store: Store,
    name: str,
    reducer: Reducer,
    shards: tuple[Shards, Shards],
    left: Collection[ShardRef],
    scores: Mapping[str, str],
    trusted: Collection[str],
) -> None:
    """Answers the new shards (second of `shards`) against the existing ones, and writes the tables of `left`."""
    existing = corpus(store, reducer, shards[0], scores, trusted, own=name)[1]
    frame, new = corpus(store, reducer, shards[1], scores, trusted)
    table = reducer.reduce(existing, new).select(list(reducer.columns))
    assert table.num_rows == new.num_rows, f"{name} gave {table.num_rows} answers for {new.num_rows} pairs"
    table = table.add_column(0, "uid", frame.table["uid"]).combine_chunks()
    for place, (_, ref) in enumerate(frame.shards):
        if ref in left:
            rows = frame.rows(place)
            fingerprint = scores[name].rsplit("-", 1)[1]
            metadata = {"filter": name, "fingerprint": fingerprint, "rows": str(rows.stop - rows.start)}
            store.write_table(ref.beside(scores[name]), table.slice(rows.start, rows.stop - rows.start), metadata)


def corpus(
    store: Store, reducer: Reducer, shards: Shards, scores: Mapping[str, str], trusted: Collection[str], own: str = ""
) -> tuple[Frame, pa.Table]:
    """What a reducer is given: `CORPUS` and what it needs, null where a pair isn't alive. With `own` it is also given
    the columns that it made under that name; a leader that is forgotten later stays one."""
    full = {need: need if "." in need else f"{OWN}.{need}" for need in reducer.needs}
    full |= {column: f"{own}.{column}" for column in reducer.columns if own}
    if not any(shards.values()):
        types = {name: pa.string() for name in CORPUS} | {"trusted": pa.bool_()}
        empty = {name: pa.array([], kind) for name, kind in (types | dict.fromkeys(reducer.needs, pa.int64())).items()}
        made = {name: pa.array([], kind) for name, kind in reducer.columns.items() if own}
        return load_frame(store, {}, [], scores, trusted), pa.table(empty | made)
    frame = load_frame(store, shards, full.values(), scores, trusted)
    counts = np.diff(frame.starts)
    increments = [name for (_, ref), rows in zip(frame.shards, counts, strict=True) for name in cuts(store, ref, rows)]
    columns = {"uid": frame.table["uid"], "source": pa.array(frame.source, pa.string())}
    columns |= {"increment": pa.array(increments, pa.string()), "trusted": pa.array(frame.trusted)}
    dead = pa.array(np.where(frame.alive, np.arange(len(frame.alive)), 0), mask=~frame.alive)
    columns |= {name: frame.table[column] if own else frame.table[column].take(dead) for name, column in full.items()}
    return frame, pa.table(columns)


def _batches(store: Store, path: str, shards: list[ShardRef]) -> list[list[ShardRef]]:
    """The shards in the batches in which they were or will be reduced; new ones by increment, over all sources."""
    told: list[list[str]] = json.loads(store.read(path)) if store.has(path) else []
    seen = {table for batch in told for table in batch}
    new = [ref for ref in shards if ref.table not in seen]
    added = [[ref.table for ref in new if ref.increment == i] for i in sorted({ref.increment for ref in new})]
    if added:
        store.write(path, json.dumps(told + added, indent=0))
    by_table = {ref.table: ref for ref in shards}
    return [[by_table[table] for table in batch if table in by_table] for batch in told + added]


def _by_source(shards: Sequence[ShardRef], source_of: Mapping[ShardRef, str]) -> dict[str, list[ShardRef]]:
    found: dict[str, list[ShardRef]] = {}
    for ref in shards:
        found.setdefault(source_of[ref], []).append(ref)
    return found
