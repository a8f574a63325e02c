"""Candidates merged by `url_key` in bounded memory, with the same bytes whatever the number of workers.

Rows are spilled in runs of 50,000: an Arrow file each, sorted by key, with one record batch per first byte of the
key. Every first byte is then merged alone (on Ray, or inline), and the parts follow one another in order of key. A
source that ends within its first run is merged where it is. About 0.1 ms a row; benchmarks/merge.py measures
it, and the memory.
"""

import contextlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from yarl import URL

from cluster.compute import Engine, map_shards
from pairs.identity import canonical_url, url_key
from pairs.schemas import CANDIDATES
from pairs.store import Store
from pairs.workspace import Dead, refused
from pipelines.sources import Row

RUN_ROWS = 50_000
GROUP_ROWS = 100_000  # of a Parquet row group
PARTS = 256
STARTS = [f"{number:02x}" for number in range(PARTS)]
TEXT_CHARS = 10_000
SPILLED = CANDIDATES.append(pa.field("position", pa.int32()))
EARLIER = pa.schema([("url_key", pa.string()), ("set", pa.int8())])
Sets = tuple[set[str], ...]
Judge = Callable[[list[Row], list[Sets], frozenset[str]], tuple[list[Row], Counter[str], list[str]]]


class Merged(NamedTuple):
    """What became of the rows, and `tables`, which yields the kept ones in order of key, `GROUP_ROWS` in each but the
    last."""

    outcome: "Outcome"
    tables: Callable[[], Iterator[pa.Table]]


@dataclass(frozen=True)
class Merge:
    """Where and on what to merge. `folder` of the store takes what is spilled; `judge` says which merged rows stay,
    from the earlier increments' sets of keys and the dead keys."""

    store: Store
    folder: str
    judge: Judge
    engine: Engine = "inline"
    workers: int = 1


@dataclass
class Outcome:
    """`kept` and `opted` count what is left of the rows that were `taken`; `late` are keys that opted out after they
    were taken in an earlier increment."""

    taken: int = 0
    kept: int = 0
    opted: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    late: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        for name in ("taken", "kept", "opted", "late"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)


def merge(rows: Iterable[Row], earlier: Iterable[Sets], dead: set[str], how: Merge) -> Merged:
    """Merges clean rows, in whatever order they come: `earlier` yields the sets of each earlier increment, in order."""
    runs, held = list[str](), list[Row]()
    for row in rows:
        held.append(row)
        if len(held) == RUN_ROWS:
            runs.append(_spill(how, f"rows-{len(runs):05d}", held, SPILLED))
            held = []
    if not runs:
        wanted = {row["url_key"] for row in held}
        near = [tuple(keys & wanted for keys in sets) for sets in earlier]
        outcome, kept = _judged(held, near, frozenset(dead & wanted), how.judge)
        whole = pa.Table.from_pylist(kept, schema=CANDIDATES)
        return Merged(outcome, lambda: iter([whole] * bool(kept)))
    if held:
        runs.append(_spill(how, f"rows-{len(runs):05d}", held, SPILLED))
        held = []
    before = [_spill(how, f"earlier-{n:05d}", list(_flat(sets)), EARLIER) for n, sets in enumerate(earlier)]
    work = partial(_merge_part, how, runs, before)
    ended: list[set[str]] = [set() for _ in range(PARTS)]
    for key in dead:
        ended[first(key)].add(key)
    total, items = Outcome(), list(enumerate(map(frozenset, ended)))
    for outcome in map_shards(work, items, engine=how.engine, workers=how.workers):
        total.add(outcome)
    total.late.sort()
    return Merged(total, partial(_groups, how))


def first(key: str) -> int:
    """Which of the parts a key belongs to."""
    return int(key[:2], 16)


def _flat(sets: Sets) -> Iterator[Row]:
    return ({"url_key": key, "set": number} for number, keys in enumerate(sets) for key in keys)


def _spill(how: Merge, name: str, rows: list[Row], schema: pa.Schema) -> str:
    """Writes rows, sorted by key, with a record batch for each of the `PARTS` first bytes."""
    path = f"{how.folder}/{name}.arrow"
    rows.sort(key=lambda row: row["url_key"])
    bounds = [bisect_left(rows, start, key=lambda row: row["url_key"]) for start in STARTS] + [len(rows)]
    whole = pa.RecordBatch.from_pylist(rows, schema=schema)
    with how.store.writing(path) as file, pa.ipc.new_file(file, schema) as out:
        for start, end in pairwise(bounds):
            out.write_batch(whole.slice(start, end - start))
    return path


@contextlib.contextmanager
def _opened(store: Store, path: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    file = pa.memory_map(store.full(path)) if store.local else store.fs.open(store.full(path))
    with file, pa.ipc.open_file(file) as reader:
        yield reader


def _batch(store: Store, path: str, number: int) -> pa.RecordBatch:
    with _opened(store, path) as reader:
        return reader.get_batch(number)


def _merge_part(how: Merge, runs: list[str], before: list[str], item: tuple[int, frozenset[str]]) -> Outcome:
    """Merges the rows whose keys have one first byte, and writes what is left of them."""
    number, dead = item
    rows = [row for path in runs for row in _batch(how.store, path, number).to_pylist()]
    earlier = [_sets(_batch(how.store, path, number)) for path in before]
    outcome, kept = _judged(rows, earlier, dead, how.judge)
    with how.store.writing(_part(how, number)) as file, pa.ipc.new_file(file, CANDIDATES) as out:
        out.write_batch(pa.RecordBatch.from_pylist(kept, schema=CANDIDATES))
    return outcome


def _sets(batch: pa.RecordBatch) -> Sets:
    sets: Sets = (set(), set(), set(), set())
    for key, number in zip(batch["url_key"].to_pylist(), batch["set"].to_pylist(), strict=True):
        sets[number].add(key)
    return sets


def _part(how: Merge, number: int) -> str:
    return f"{how.folder}/merged-{number:05d}.arrow"


def _judged(rows: list[Row], earlier: list[Sets], dead: frozenset[str], judge: Judge) -> tuple[Outcome, list[Row]]:
    merged = merge_rows(rows)
    kept, dropped, late = judge(merged, earlier, dead)
    dropped["merged"] += len(rows) - len(merged)
    opted = sum(row["opt_out"] is not None for row in kept)
    return Outcome(len(rows), len(kept), opted, dropped, late), sorted(kept, key=lambda row: row["url_key"])


def _groups(how: Merge) -> Iterator[pa.Table]:
    """The merged parts one after another, in tables of `GROUP_ROWS` whatever the parts' sizes."""
    held = CANDIDATES.empty_table()
    for number in range(PARTS):
        held = pa.concat_tables([held, pa.Table.from_batches([_batch(how.store, _part(how, number), 0)])])
        while held.num_rows >= GROUP_ROWS:
            yield held[:GROUP_ROWS].combine_chunks()
            held = held[GROUP_ROWS:]
    if held.num_rows:
        yield held.combine_chunks()


def write_groups(store: Store, path: str, tables: Iterator[pa.Table], facts: dict[str, str]) -> None:
    """Writes tables into one Parquet file, a row group each, with `facts` as the schema's key-value pairs."""
    schema = CANDIDATES.with_metadata(facts)
    options: dict[str, Any] = {"compression": "zstd", "store_schema": True, "write_page_checksum": True}
    with store.writing(path) as file, pq.ParquetWriter(file, schema, **options) as out:
        for table in tables:
            out.write_table(table.replace_schema_metadata(facts))


def clean(row: Row, dropped: Counter[str]) -> Row | None:
    """The row with its key, address and trimmed texts; None where it has no address to fetch."""
    blank: dict[str, Any] = dict.fromkeys(CANDIDATES.names)
    if row.get("url_key") is None:
        reason = bad_address(row["url"])
        if reason:
            dropped[reason] += 1
            return None
        row = row | {"url": _as_found(row["url"]), "url_key": url_key(row["url"])}
    texts = []
    for entry in row["texts"]:
        words = " ".join(entry["text"].encode("utf-8", "replace").decode().split())
        dropped["text_cut"] += len(words) > TEXT_CHARS
        if words:
            texts.append(entry | {"text": words[:TEXT_CHARS]})
    return blank | {"position": 0} | row | {"texts": texts}


def living(rows: Iterable[Row], dead: Dead, dropped: Counter[str]) -> Iterator[Row]:
    """The clean rows that aren't forgotten; the others are counted."""
    for row in rows:
        if refused(dead, row["url_key"], row["url"]):
            dropped["forgotten"] += 1
        else:
            yield row


def _as_found(url: str) -> str:
    """The address to ask for: as it stood, since a signature may cover the order of a query; its canonical form is for
    `url_key` alone. One that no line can hold is canonical all the same."""
    plain = url.strip().partition("#")[0]
    return plain if plain.isprintable() else canonical_url(url)


def bad_address(url: str) -> str | None:
    """Why nothing can be fetched from an address, or None."""
    scheme = url.strip().partition(":")[0].lower()
    if scheme == "data":
        return "data_url"
    if scheme not in ("http", "https"):
        return "scheme"
    try:
        return None if URL(url.strip()).host else "bad_url"
    except ValueError:
        return "bad_url"


def merge_rows(rows: list[Row]) -> list[Row]:
    """One row per url_key: texts in order of page and position (page titles last), equal ones once; the first opt-out
    holds, wherever it stood."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["url_key"], []).append(row)
    return [_join(sorted(group, key=lambda row: (row["page"] or "", row["position"]))) for group in groups.values()]


def _join(group: list[Row]) -> Row:
    texts: dict[str, Any] = {}
    for entry in sorted((e for row in group for e in row["texts"]), key=lambda entry: entry["kind"] == "title"):
        texts.setdefault(entry["text"], entry)
    facts = {
        name: next((row[name] for row in group if row[name] is not None), None)
        for name in ("license", "opt_out", "source_uid", "page")
    }
    first = {name: value for name, value in group[0].items() if name != "position"}
    return first | facts | {"texts": list(texts.values())}
