"""Runs the reducers over what is new: an increment after the other, one table per shard beside the filters' scores.

`order.json` beside a reducer's tables lists the batches that were reduced together, and is written before their
tables: a batch that was cut short is reduced again against the batches before it, so its answers are those of a
run that was never killed. Earlier tables are read, never written. Memory: what the reducer condenses rows to.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from cluster.compute import Engine
from filters.base import Reducer, fingerprint_of, needed_filters
from filters.parts import Part, Work, parts
from pairs.fingerprint import fingerprint
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.workspace import Workspace

ASKED = "asked"  # a folder of the workspace: what reducers answered about canaries
LACKING = ".lacking"  # no reducer's column: names have no dot
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
    store: Store,
    reducers: Mapping[str, Reducer],
    shards: Shards,
    scores: Mapping[str, str],
    trusted: Collection[str],
    engine: Engine = "inline",
    workers: int = 1,
) -> dict[str, str]:
    """Makes what tables are missing; engine and workers don't change the bytes. Returns the folder of each reducer's
    tables, in the form of `scores`."""
    folders: dict[str, str] = {}
    for name, reducer in reducers.items():
        known = {**scores, **folders}
        folders[name] = reducer_folder(name, reducer, known, shards, trusted)
        work = Work(store, folders[name], engine=engine, workers=workers)
        _run(name, reducer, shards, known | {name: folders[name]}, trusted, work)
    return folders


def ask(
    store: Store,
    name: str,
    reducer: Reducer,
    shards: Shards,
    scores: Mapping[str, str],
    trusted: Collection[str],
    queries: Shards,
    exclude: Sequence[str | None],
    engine: Engine = "inline",
    workers: int = 1,
) -> tuple[pa.Table, np.ndarray]:
    """What the reducer would answer the rows of `queries`, each alone, without the uid at its place in `exclude`; and
    which of them lack what it needs. Changes nothing."""
    left_out = {uid for uid in exclude if uid is not None} | Workspace(store).tombstones()["uid"]
    asking = parts(store, reducer, queries, scores, [])
    corpus = parts(store, reducer, shards, scores, trusted, own=name, without=left_out)
    work = Work(store, scores[name], engine=engine, workers=workers)
    with work.spread(part.ref for part in corpus) as spread:
        answers = reducer.query_parts(corpus, asking, exclude, spread)
    needs = pa.concat_tables([part.load() for part in asking]).select(list(reducer.needs))
    return answers, np.logical_or.reduce([column.is_null().to_numpy() for column in needs.columns])


def asked(
    store: Store,
    name: str,
    reducer: Reducer,
    shards: Shards,
    scores: Mapping[str, str],
    trusted: Collection[str],
    queries: Shards,
    exclude: Sequence[str | None],
    engine: Engine = "inline",
    workers: int = 1,
) -> tuple[pa.Table, np.ndarray]:
    """As `ask`, which is called once: the answers stay in `asked/` for as long as the corpus and the queries are the
    same. No threshold changes them."""
    both = {"corpus": shards, "queries": queries}
    listed = {of: {s: [ref.table for ref in refs] for s, refs in some.items()} for of, some in both.items()}
    dead = {kind: sorted(ids) for kind, ids in Workspace(store).tombstones().items()}
    mark = fingerprint({**listed, "exclude": list(exclude), "tombstones": dead})
    path = f"{ASKED}/{scores[name].removeprefix('scores/')}-{mark}.parquet"
    if not store.has(path):
        answers, lacking = ask(store, name, reducer, shards, scores, trusted, queries, exclude, engine, workers)
        store.write_table(path, answers.append_column(LACKING, pa.array(lacking)))
    table = store.read_table(path)
    return table.drop_columns([LACKING]), table[LACKING].to_numpy()


def _run(
    name: str, reducer: Reducer, shards: Shards, scores: Mapping[str, str], trusted: Collection[str], work: Work
) -> None:
    source_of = {ref: source for source, refs in shards.items() for ref in refs}
    there = set(work.store.files(work.folder, ".parquet"))
    if all(ref.beside(work.folder) in there for ref in source_of):
        return
    dead = Workspace(work.store).tombstones()["uid"]
    batches = _batches(work.store, f"{work.folder}/order.json", sorted(source_of))
    with work.spread(source_of) as spread:
        for place, batch in enumerate(batches):
            left = [ref for ref in batch if ref.beside(work.folder) not in there]
            if left:
                before = _by_source([ref for earlier in batches[:place] for ref in earlier], source_of)
                existing = parts(work.store, reducer, before, scores, trusted, own=name, without=dead)
                new = parts(work.store, reducer, _by_source(batch, source_of), scores, trusted)
                _reduce(name, reducer, existing, new, left, replace(spread, batch=place))


def _reduce(
    name: str, reducer: Reducer, existing: list[Part], new: list[Part], left: Collection[ShardRef], work: Work
) -> None:
    """Answers the new parts against the existing ones, and writes the tables of `left`."""
    uids = [work.store.read_table(part.ref.table, ["uid"]) for part in new]
    table = reducer.reduce_parts(existing, new, work).select(list(reducer.columns))
    count = sum(column.num_rows for column in uids)
    assert table.num_rows == count, f"{name} gave {table.num_rows} answers for {count} pairs"
    table = table.add_column(0, "uid", pa.concat_tables(uids)["uid"]).combine_chunks()
    metadata, start = {"filter": name, "fingerprint": work.folder.rsplit("-", 1)[1]}, 0
    for part, column in zip(new, uids, strict=True):
        rows = table.slice(start, column.num_rows)
        start += column.num_rows
        if part.ref in left:
            work.store.write_table(part.ref.beside(work.folder), rows, metadata | {"rows": str(rows.num_rows)})


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
