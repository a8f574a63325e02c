"""Merges increments into one: the new one is written whole, then a mark commits it, then the old ones are deleted.

Every table keeps the order of `url_key` and the blocks of candidates that a fetch would have cut, members are copied
byte for byte, scores and verdicts follow their rows. A key that several of the increments tried has all rows
in `tries/`, in the ledger the one that gave a pair, else the last. Trainings are known by the merged shards too; of the
shards that they were pinned to, `pinned/` keeps what a plan is made from. Memory: the tables of the merged increments.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from filters.columns import check_same_pairs
from filters.score_tables import merged_facts
from pairs.errors import PairmillError
from pairs.increments import MARK, owned, settle
from pairs.schemas import LEDGER, TRIES
from pairs.shard import ShardRef, check_tar, copy_shard, cuts, list_shards, shard_at
from pairs.store import Store, table_metadata
from pairs.workspace import Workspace
from pipelines.candidates import part
from pipelines.fetch.ledger import ledger_part
from pipelines.merge import GROUP_ROWS, write_groups
from pipelines.models import trained
from pipelines.training_shards import training_shard
from training.config import BlipJob, Pin, TrainConfig
from training.tables import COLUMNS

DERIVED = ("scores", "selections", "shards")  # what mirrors pair shards


@dataclass(frozen=True)
class Merge:
    """`members` of a source become `name`; `sizes` are the candidates of a shard, by group. `told` says it in words."""

    source: str
    name: str
    members: list[str]
    sizes: Mapping[str, int]
    told: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of several tables in order of `url_key`: `table` as it was read, `order` the row numbers, `starts` the first
    key of each block."""

    table: pa.Table
    order: list[int]
    keys: list[str]
    starts: Sequence[str]

    def blocks(self) -> Iterator[list[int]]:
        """The row numbers of each block."""
        found: list[list[int]] = [[] for _ in self.starts]
        for row in self.order:
            found[bisect_right(self.starts, self.keys[row]) - 1].append(row)
        return iter(found)


def join(workspace: Workspace, merge: Merge) -> None:
    """Does one merge; call it under the workspace's lock. Killed before the commit it is undone, after it it is ended,
    by whoever holds the lock next (`pairs.increments.settle`)."""
    store = workspace.store
    mark = {"source": merge.source, "merged": merge.name, "members": merge.members}
    store.write(MARK, json.dumps(mark | {"committed": False}))
    try:
        _write(workspace, merge)
    except Exception:  # a full disk, a damaged file: taken back at once
        settle(store)
        raise
    store.write(MARK, json.dumps(mark | {"committed": True}))
    settle(store)


def _write(workspace: Workspace, merge: Merge) -> None:
    """All of the merged increment, which nobody sees yet."""
    keys, again = _candidates(workspace.store, merge)
    for group, size in merge.sizes.items():
        starts = keys[::size]
        _ledger(workspace.store, merge, group, starts, keys, again)
        _pairs(workspace.store, merge, group, starts)
    _trainings(workspace, merge)


def _ordered(table: pa.Table, starts: Sequence[str], path: str) -> Rows:
    """Rows whose keys are all different."""
    keys = table["url_key"].to_pylist()
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise PairmillError(
            expected=f"each url_key once in {path}",
            found=f"{twice[0]} twice",
            remedy="run `pairmill verify` on the workspace",
        )
    return Rows(table, sorted(range(len(keys)), key=keys.__getitem__), keys, starts)


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    plain = [table.replace_schema_metadata(None) for table in tables]
    return pa.concat_tables([table.cast(plain[0].schema) for table in plain]).combine_chunks()


def _candidates(store: Store, merge: Merge) -> tuple[list[str], set[str]]:
    """Joins the candidates; of a key its last row stands. Returns the sorted keys, and those that stood in several."""
    tables = [store.read_table(part(merge.source, name)) for name in merge.members]
    table = _concat(tables)
    keys = table["url_key"].to_pylist()
    last = {key: row for row, key in enumerate(keys)}
    facts, members = [table_metadata(one) for one in tables], dict[str, str]()
    for name, told in zip(merge.members, facts, strict=True):
        members |= json.loads(told["members"]) if "members" in told else {name: told.get("counts", "null")}
    kept = {name: told for name, told in facts[-1].items() if name == "settings"}
    merged = table.take(pa.array([last[key] for key in sorted(last)], pa.int64()))
    groups = (merged.slice(start, GROUP_ROWS) for start in range(0, merged.num_rows, GROUP_ROWS))
    write_groups(store, part(merge.source, merge.name), groups, kept | {"members": json.dumps(members)})
    return sorted(last), {key for key, count in Counter(keys).items() if count > 1}


def _ledger(store: Store, merge: Merge, group: str, starts: Sequence[str], keys: list[str], again: set[str]) -> None:
    """Joins the ledger: of a key that was tried several times the row that gave a pair, else the last."""
    table = _concat([_cut(store, group, name) for name in merge.members])
    states, standing = table["status"].to_pylist(), dict[str, int]()
    for row, key in enumerate(table["url_key"].to_pylist()):
        if key not in standing or states[standing[key]] != "ok":
            standing[key] = row
    if sorted(standing) != keys:
        raise PairmillError(
            expected=f"a row of each candidate in ledger/{group} of {', '.join(merge.members)}",
            found=f"{len(standing)} rows for {len(keys)} candidates",
            remedy="run `pairmill verify` on the workspace",
        )
    rows = _ordered(table.drop_columns(["increment"]).take(_places(standing.values())), starts, f"ledger/{group}")
    for index, block in enumerate(rows.blocks()):
        store.write_table(ledger_part(group, merge.name, index), rows.table.take(_places(block)))
    tries = [row for name in merge.members for row in _tries(store, group, name, again)]
    if tries:
        tries.sort(key=lambda row: (row["increment"], row["url_key"]))
        table = pa.Table.from_pylist(tries, schema=TRIES)
        store.write_table(f"tries/{group}/{merge.name}/00000.parquet", table)


def _cut(store: Store, group: str, name: str) -> pa.Table:
    """All rows of a ledger, with the increment that they are of."""
    paths = store.files(f"ledger/{group}/{name}", ".parquet")
    table = _concat([LEDGER.empty_table(), *map(store.read_table, paths)])
    return table.append_column("increment", pa.array([name] * table.num_rows, pa.string()))


def _tries(store: Store, group: str, name: str, again: set[str]) -> list[dict[str, Any]]:
    """All rows of a member for keys that several increments tried; what was merged before has told its own."""
    paths = store.files(f"tries/{group}/{name}", ".parquet")
    told = [row for path in paths for row in store.read_table(path).to_pylist()]
    several = again - {row["url_key"] for row in told}
    ledger = _cut(store, group, name)
    rows = ledger.filter(pc.is_in(ledger["url_key"], pa.array(sorted(several), pa.string()))).to_pylist()
    return told + rows


def _pairs(store: Store, merge: Merge, group: str, starts: Sequence[str]) -> None:
    """Joins the pair shards of a group, and after them whatever mirrors them."""
    refs = [ref for name in merge.members for ref in list_shards(store, f"pairs/{group}/{name}")]
    tables, origins = _read(store, refs)
    rows = _ordered(_concat(tables), starts, f"pairs/{group}")
    cut = [name for ref, table in zip(refs, tables, strict=True) for name in cuts(store, ref, table.num_rows)]
    names = sorted(set(cut))
    for index, block in enumerate(rows.blocks()):
        facts = {"cuts": " ".join(names), "cut_of": " ".join(str(names.index(cut[row])) for row in block)}
        _copy(store, ShardRef(f"pairs/{group}/{merge.name}", index), rows, block, origins, facts)
    for folder in (f"{kind}/{name}" for kind in DERIVED for name in store.folders(kind)):
        if not all(store.has(ref.beside(folder)) for ref in refs):
            continue  # all of them or none have it: what has seen the members is the same
        if folder.startswith("shards/"):
            _training(store, merge, folder, refs, starts)
        else:
            _mirror(store, merge, folder, refs, rows)


def _read(store: Store, refs: Sequence[ShardRef]) -> tuple[list[pa.Table], list[ShardRef]]:
    """The tables of sound shards, and the shard of each row."""
    tables = [store.read_table(ref.table) for ref in refs]
    for ref, table in zip(refs, tables, strict=True):
        check_tar(store, ref, table)
    return tables, [ref for ref, table in zip(refs, tables, strict=True) for _ in range(table.num_rows)]


def _copy(
    store: Store, ref: ShardRef, rows: Rows, block: list[int], origins: Sequence[ShardRef], facts: dict[str, str]
) -> None:
    found = rows.table.take(_places(block)).to_pylist()
    copy_shard(store, ref, zip(found, (origins[row] for row in block), strict=True), facts)


def _training(store: Store, merge: Merge, folder: str, refs: Sequence[ShardRef], starts: Sequence[str]) -> None:
    """Joins training shards."""
    tables, origins = _read(store, [training_shard(folder, ref) for ref in refs])
    rows = _ordered(_concat(tables), starts, folder)
    for index, block in enumerate(rows.blocks()):
        _copy(store, ShardRef(f"{folder}/{refs[0].group}/{merge.name}", index), rows, block, origins, {})


def _mirror(store: Store, merge: Merge, folder: str, refs: Sequence[ShardRef], pairs: Rows) -> None:
    """Joins score or selection tables, which follow the rows of their pairs."""
    tables = [store.read_table(ref.beside(folder)) for ref in refs]
    table, at = _concat(tables), 0
    for ref, one in zip(refs, tables, strict=True):
        check_same_pairs(ref, pairs.table["uid"].slice(at, one.num_rows), one, ref.beside(folder))
        at += one.num_rows
    assert at == pairs.table.num_rows, f"{folder} has {at} rows for {pairs.table.num_rows} pairs"
    living = Workspace(store).alive(pairs.table)
    for index, block in enumerate(pairs.blocks()):
        rows = table.take(_places(block))
        path = f"{folder}/{refs[0].group}/{merge.name}/{index:05d}.parquet"
        store.write_table(path, rows, merged_facts(tables, rows, block, [living[row] for row in block]) or None)


def _places(rows: Iterable[int]) -> pa.Array:
    return pa.array(list(rows), pa.int64())


def _trainings(workspace: Workspace, merge: Merge) -> None:
    """Keeps what the plans of trainings are made from, and makes finished ones known by the merged shards."""
    store = workspace.store
    for path in store.files("runs", "/config.json"):
        config = json.loads(store.read(path))
        if "shards" not in config or "spec" not in config:
            continue
        fingerprint = path.split("/")[-2]
        for pins in _known_as(store, fingerprint, [Pin(**pin) for pin in config["shards"]]):
            mine = [pin for pin in pins if owned(pin.ref.table, merge.source, merge.members)]
            for pin in mine:
                _keep(store, pin.ref)
            if mine and trained(workspace, fingerprint):
                _rename(store, fingerprint, config, pins, mine, merge)


def _known_as(store: Store, fingerprint: str, pins: list[Pin]) -> Iterator[list[Pin]]:
    """A training's pins, and what earlier merges made of them."""
    yield pins
    for path in store.files("models/index", ".json"):
        told = json.loads(store.read(path))
        if told.get("same_as") == fingerprint:
            yield [Pin(**pin) for pin in told["shards"]]


def _keep(store: Store, ref: ShardRef) -> None:
    """Of a shard that goes: the columns that a plan is made from; of a pair shard, which has no plan, the uids."""
    columns = COLUMNS if ref.folder.startswith("shards/") else ["uid"]
    if store.has(ref.table):
        table = store.read_table(ref.table, columns)
        store.write_table(f"pinned/{ref.table}", table, table_metadata(table))


def _rename(
    store: Store, fingerprint: str, config: dict[str, Any], pins: list[Pin], mine: list[Pin], merge: Merge
) -> None:
    """Makes a finished training known by the merged shards, where it had all of what they hold, as it is now."""
    now: list[Pin] = []
    for above in sorted({pin.folder.rpartition("/")[0] for pin in mine}):
        old = [ref for name in merge.members for ref in list_shards(store, f"{above}/{name}")]
        if _pins(store, old) != sorted((pin for pin in mine if pin.folder.rpartition("/")[0] == above), key=_place):
            return
        now += _pins(store, [shard_at(path) for path in store.every(f"{above}/{merge.name}", ".parquet")])
    try:
        job = (BlipJob if "word_steps" in config["spec"] else TrainConfig)(**config)
    except ValidationError:  # another version's: it isn't known by its fingerprint any more either
        return
    stay = [pin for pin in pins if pin not in mine]
    known = job.model_copy(update={"shards": sorted(stay + now, key=_place)})
    if job.fingerprint == fingerprint:
        told = {"same_as": fingerprint, "shards": [pin.model_dump() for pin in known.shards]}
        store.write(f"models/index/{known.fingerprint}.json", json.dumps(told, indent=1))


def _pins(store: Store, refs: Iterable[ShardRef]) -> list[Pin]:
    """The shards by their tars' hashes; training shards of no rows are never pinned."""
    tables = ((ref, store.read_table(ref.table, ["uid"])) for ref in sorted(refs))
    full = ((ref, table_metadata(t)) for ref, t in tables if t.num_rows or not ref.folder.startswith("shards/"))
    return [Pin(folder=ref.folder, index=ref.index, tar_sha256=told["tar_sha256"]) for ref, told in full]


def _place(pin: Pin) -> ShardRef:
    return pin.ref
