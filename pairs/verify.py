"""Checks a workspace against its own promises: every tar, table, offset, hash and count.

Reads each tar once, in a stream of one shard at a time. A problem names the file and what is wrong; a
tar without a table is what a killed writer leaves, harmless, and counted as unfinished.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.identity import make_uid, sha256_hex, url_key
from pairs.increments import MARK, holding
from pairs.schemas import CANDIDATES, LEDGER, PAIRS, SELECTION, TRAINING
from pairs.shard import MEMBERS, ShardRef, list_shards, shard_at
from pairs.store import Store, table_metadata
from pairs.tar import Member, read_members
from pairs.workspace import Dead, Workspace, alive, refused

SHARDED = {"pairs": PAIRS, "shards": TRAINING, "canaries": PAIRS}
ALIGNED = ("scores", "selections")
AGAIN = "run `pairmill forget` on this workspace again: it takes them out"


@dataclass
class Verdict:
    """What `verify` found: counts of what was checked, and problems as (path, what is wrong)."""

    checked: dict[str, int] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number


def verify(workspace: Workspace, progress: Callable[[str], None] = lambda _: None) -> Verdict:
    """Checks everything below `workspace` that has a promise to keep."""
    verdict, store = Verdict(), workspace.store
    verdict.unfinished += [MARK] if store.has(MARK) else []
    dead = _guarded_tombstones(verdict, workspace)
    for kind, schema in SHARDED.items():
        for path in store.files(kind, ".parquet"):
            progress(path)
            check = functools.partial(_check_shard, verdict, store, path, schema, kind, dead)
            _guarded(verdict, path, check)
        tables = {path.removesuffix(".parquet") for path in store.files(kind, ".parquet")}
        verdict.unfinished += [t for t in store.files(kind, ".tar") if t.removesuffix(".tar") not in tables]
    for group in store.folders("pairs"):
        _guarded(verdict, f"pairs/{group}", lambda g=group: _check_uids(store, g))  # type: ignore[misc]
    for kind in ALIGNED:
        for path in store.files(kind, ".parquet"):
            progress(path)
            _guarded(verdict, path, lambda p=path: _check_aligned(verdict, store, p, dead))  # type: ignore[misc]
    for path in store.files("candidates", ".parquet"):
        progress(path)
        _guarded(verdict, path, lambda p=path: _check_candidates(verdict, store, p, dead))  # type: ignore[misc]
    for path in [*store.files("tries", ".parquet"), *store.files("pinned", ".parquet")]:
        _guarded(verdict, path, lambda p=path: _check_kept(store, p, dead))  # type: ignore[misc]
    for path in [*store.files("crawl"), *store.files("cache")] if any(dead.values()) else []:
        _guarded(verdict, path, lambda p=path: _check_found(store, p, dead))  # type: ignore[misc]
    _guarded(verdict, "runs", lambda: _check_increments(verdict, store))
    for name in store.folders("shards"):
        _guarded(verdict, f"shards/{name}", lambda n=name: _check_training(verdict, workspace, n))  # type: ignore[misc]
    for name in (n for n in store.folders("models") if store.local and len(n) == 64):
        verdict.count("models")
        _guarded(verdict, f"models/{name}", lambda n=name: _check_model(store, n))  # type: ignore[misc]
    return verdict


def _guarded_tombstones(verdict: Verdict, workspace: Workspace) -> Dead:
    """The tombstones, counted; a damaged list of them is a problem, and counts as none for the other checks."""
    dead: dict[str, set[str]] = {"url_key": set(), "uid": set(), "host": set(), "sha256": set()}

    def read() -> Iterator[str]:
        dead.update(workspace.tombstones())
        verdict.count("tombstones", sum(map(len, dead.values())))
        yield from ()

    _guarded(verdict, "tombstones.parquet", read)
    return dead


def _guarded(verdict: Verdict, path: str, check: Callable[[], Iterator[str]]) -> None:
    try:
        for problem in check():
            verdict.problems.append((path, problem))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        kind = "" if isinstance(error, PairmillError) else f"{type(error).__name__}: "
        verdict.problems.append((path, kind + " ".join(str(error).split())))


def _check_shard(verdict: Verdict, store: Store, path: str, schema: pa.Schema, kind: str, dead: Dead) -> Iterator[str]:
    ref, table = shard_at(path), store.read_table(path)
    meta = table_metadata(table)
    if not table.schema.equals(schema, check_metadata=False):
        yield "its columns aren't those of its kind"
        return
    if meta.get("rows") != str(table.num_rows):
        yield f"{table.num_rows} rows where {meta.get('rows')} were recorded"
    if not store.has(ref.tar):
        yield f"{ref.tar} is missing"
        return
    data = store.read(ref.tar)
    verdict.count("tars")
    verdict.count(f"rows in {kind}", table.num_rows)
    if meta.get("tar_size") != str(len(data)) or meta.get("tar_sha256") != sha256_hex(data):
        yield f"{ref.tar} isn't the tar that was recorded (size or sha256)"
    yield from _check_members(table, data, ref, kind)
    yield from _check_dead(table, dead)


def _check_uids(store: Store, group: str) -> Iterator[str]:
    """A pair is in one shard of its group alone, whatever its increments."""
    uids = [store.read_table(ref.table, ["uid"])["uid"] for ref in list_shards(store, f"pairs/{group}")]
    if uids and (twice := sum(map(len, uids)) - pc.count_distinct(pa.chunked_array(uids)).as_py()):
        yield f"{twice} uids stand in it more than once"


def _check_dead(table: pa.Table, dead: Dead) -> Iterator[str]:
    """What is forgotten, by key, uid, host, bytes, or as a canary's origin, has no living row."""
    columns = ("uid", "url_key", "sha256", "source_uid")
    dead_by = {"source_uid": dead["uid"]} | {name: dead[name] for name in columns[:3]}
    rows = table.filter(pc.equal(table["status"], "ok"))
    left = 0
    for row in rows.select([n for n in (*columns, "url") if n in rows.column_names]).to_pylist():
        left += any(row.get(n) in dead_by[n] for n in columns) or refused(dead, "", row.get("url"))
    if left:
        yield f"{left} pairs that are forgotten are still in it: {AGAIN}"


def _check_members(table: pa.Table, data: bytes, ref: ShardRef, kind: str) -> Iterator[str]:
    found = {(m.key, m.offset): m for m in read_members(data, ref.tar)}
    living = [row for row in table.to_pylist() if row["status"] == "ok"]
    if len(found) != len(MEMBERS) * len(living):
        yield f"{len(found)} members in {ref.tar} for {len(living)} living rows"
    for row in living:
        members = [found.get((row["uid"], row[f"{name}_offset"])) for name in MEMBERS]
        if any(m is None or m.size != row[f"{n}_size"] for m, n in zip(members, MEMBERS, strict=True)):
            yield f"{row['uid']}: an offset or a size isn't the member's"
            continue
        yield from _check_row(row, [m for m in members if m], data, kind)


def _check_row(row: dict[str, object], members: list[Member], data: bytes, kind: str) -> Iterator[str]:
    _, text, facts = (data[m.offset : m.offset + m.size] for m in members)
    if [m.ext for m in members] != [row["image_ext"], "txt", "json"]:
        yield f"{row['uid']}: its members are named {', '.join(m.ext for m in members)}"
    if text.decode("utf-8", "replace") != (row["text"] or ""):
        yield f"{row['uid']}: the text in the tar isn't the table's"
    if json.loads(facts).get("uid") != row["uid"] or row["key"] != row["uid"]:
        yield f"{row['uid']}: the key or the JSON names another pair"
    if kind == "pairs" and make_uid(str(row["url_key"]), str(row["sha256"])) != row["uid"]:
        yield f"{row['uid']}: the uid isn't the hash of its url_key and sha256"


def _check_aligned(verdict: Verdict, store: Store, path: str, dead: Dead) -> Iterator[str]:
    """A score or selection table against the shard that it mirrors."""
    tail = path.split("/", 2)[2]
    base = next((f"{kind}/{tail}" for kind in ("pairs", "canaries") if store.has(f"{kind}/{tail}")), None)
    table = store.read_table(path)
    verdict.count(f"tables in {path.split('/')[0]}")
    if base is None:
        yield f"no shard pairs/{tail} that it belongs to"
        return
    if not table["uid"].equals(store.read_table(base, ["uid"])["uid"]):
        yield f"its uids aren't those of {base}, row by row"
    if path.startswith("selections/") and not table.schema.equals(SELECTION, check_metadata=False):
        yield "its columns aren't those of a selection"
    content = [n for n in table.column_names if n not in ("uid", "kept", "dropped_by", "would_drop")]
    rows = table.filter(pc.is_in(table["uid"], pa.array(sorted(dead["uid"]), pa.string())))
    if any(rows[name].null_count < rows.num_rows for name in content):
        yield f"values of forgotten pairs are still in it: {AGAIN}"


def _check_candidates(verdict: Verdict, store: Store, path: str, dead: Dead) -> Iterator[str]:
    _, source, increment, _ = path.split("/")
    table = store.read_table(path)
    keys = table["url_key"].to_pylist()
    verdict.count("candidates", len(keys))
    if not table.schema.equals(CANDIDATES, check_metadata=False):
        yield "its columns aren't those of candidates"
    if keys != sorted(set(keys)):
        yield "its url_keys aren't sorted and unique"
    if left := sum(u is not None and refused(dead, k, u) for k, u in zip(keys, table["url"].to_pylist(), strict=True)):
        yield f"{left} candidates that are forgotten are still in it: {AGAIN}"
    for group in store.folders("ledger"):
        if group.rpartition("-")[0] == source:
            yield from _check_ledger(verdict, store, f"ledger/{group}/{increment}", keys, dead)


def _check_found(store: Store, path: str, dead: Dead) -> Iterator[str]:
    """What a crawl has written down so far, and what is kept of the pages it read."""
    left = 0
    if path.endswith(".jsonl"):
        for line in store.read(path).split(b"\n")[:-1]:
            left += sum(refused(dead, url_key(url), url) for url in _addresses(json.loads(line)))
    elif path.endswith((".parquet", ".arrow")):
        arrow = path.endswith(".arrow")
        table = pa.ipc.open_file(pa.BufferReader(store.read(path))).read_all() if arrow else store.read_table(path)
        rows = table.select([n for n in ("url_key", "url") if n in table.column_names]).to_pylist()
        told = [(row.get("url_key") or url_key(row["url"]), row["url"]) for row in rows if row.get("url")]
        left += sum(refused(dead, key, url) for key, url in told)
    if left:
        yield f"{left} addresses that are forgotten are still in it: {AGAIN}"


def _check_kept(store: Store, path: str, dead: Dead) -> Iterator[str]:
    """What `compact` keeps of files that are gone says nothing of what is forgotten."""
    table = store.read_table(path)
    rows = table.select([n for n in ("url_key", "url", "uid", "text") if n in table.column_names]).to_pylist()
    urls = sum(row.get("url") is not None and refused(dead, row["url_key"], row["url"]) for row in rows)
    if left := urls + sum(row.get("text") is not None and row["uid"] in dead["uid"] for row in rows):
        yield f"{left} rows that are forgotten are still in it: {AGAIN}"


def _addresses(line: dict[str, Any]) -> Iterator[str]:
    """The addresses in a crawl's record of a page or a sitemap."""
    yield from (line[name] for name in ("url", "sitemap", "redirect") if line.get(name))
    yield from [*line.get("links", ()), *line.get("more", ()), *(image["url"] for image in line.get("images", ()))]


def _check_ledger(verdict: Verdict, store: Store, folder: str, keys: list[str], dead: Dead) -> Iterator[str]:
    parts = [store.read_table(p) for p in store.files(folder, ".parquet")]
    if not parts:
        return
    ledger = pa.concat_tables([part.replace_schema_metadata(None) for part in parts], promote_options="default")
    tried = ledger["url_key"].to_pylist()
    verdict.count("ledger rows", len(tried))
    if not ledger.schema.equals(LEDGER, check_metadata=False):
        yield f"{folder}: its columns aren't those of a ledger"
    urls = ledger["url"].to_pylist()
    if left := sum(u is not None and refused(dead, k, u) for k, u in zip(tried, urls, strict=True)):
        yield f"{folder}: {left} rows that are forgotten still have their address: {AGAIN}"
    if len(tried) != len(set(tried)) or not set(tried) <= set(keys):
        yield f"{folder}: a candidate has two rows, or a row has no candidate"


def _check_increments(verdict: Verdict, store: Store) -> Iterator[str]:
    """What runs are pinned to is whole: a ledger row for every candidate, a pair for every ok, no shard left out. An
    increment that no run is pinned to may be under way."""
    told = [json.loads(store.read(p)) for p in store.files("runs", "lineage.json")]
    pinned = {(source, i, run["fetch"]) for run in told for source, all_ in run["increments"].items()
              for i in holding(store.folders(f"candidates/{source}"), all_)}  # fmt: skip
    for source, increment, mark in sorted(pinned):
        folder = f"{source}-{mark}/{increment}"
        for kind, problem in _check_fetched(store, folder, f"candidates/{source}/{increment}"):
            verdict.problems.append((f"{kind}/{folder}", problem))
        verdict.count("increments")
    yield from ()


def _check_fetched(store: Store, folder: str, cut: str) -> Iterator[tuple[str, str]]:
    parts = {p: store.read_table(p) for p in store.files(f"ledger/{folder}", ".parquet")}
    candidates = store.read_table(f"{cut}/part-00000.parquet", ["url_key"])["url_key"]
    rows = [row for part in parts.values() for row in part.select(["url_key", "status", "uid"]).to_pylist()]
    if without := set(candidates.to_pylist()) - {row["url_key"] for row in rows}:
        yield "ledger", f"{len(without)} of {len(candidates)} candidates have no row"
    refs = list_shards(store, f"pairs/{folder}")
    indices, made = [ref.index for ref in refs], sorted(int(p.rsplit("/", 1)[1].split(".")[0]) for p in parts)
    if indices != list(range(len(indices))) or indices != made:
        yield "pairs", f"shards {indices} where the ledger has parts {made}"
    had: dict[str, str] = {}
    for ref in refs:
        table = store.read_table(ref.table, ["url_key", "uid"])
        had |= zip(table["url_key"].to_pylist(), table["uid"].to_pylist(), strict=True)
    fetched = {row["url_key"]: row["uid"] for row in rows if row["status"] == "ok"}  # no uid: it is forgotten
    same = {key for key, uid in fetched.items() if key in had and uid in (None, had[key])}
    lost, strange = len(fetched) - len(same), len(had) - len(same)
    if lost or strange:
        yield "pairs", f"{lost} pairs that the ledger calls ok are missing, {strange} are not in the ledger"


def _check_training(verdict: Verdict, workspace: Workspace, name: str) -> Iterator[str]:
    """Of a finished selection: what it keeps and nobody has forgotten is what training reads."""
    store, dead = workspace.store, workspace.tombstones()
    if not store.has(f"selections/{name}/manifest.json"):
        return
    trained = _by_increment(store, list_shards(store, f"shards/{name}"))
    for increment, chosen in _by_increment(store, list_shards(store, f"selections/{name}")).items():
        living: set[str] = set()
        for ref in list_shards(store, f"pairs/{increment}"):
            table = store.read_table(ref.table, ["uid", "url_key", "status"])
            living |= set(table.filter(alive(table, dead))["uid"].to_pylist())
        kept = {u for t in chosen for u, k in zip(t["uid"].to_pylist(), t["kept"].to_pylist(), strict=True) if k}
        tables = trained.get(increment, [])
        read = {u for t in tables for u in t.filter(pc.equal(t["status"], "ok"))["uid"].to_pylist()}
        if strange := read - kept:
            yield f"{len(strange)} training examples of {increment} are not kept by the selection"
        if lost := (kept & living) - read:
            if len(tables) < len(chosen):
                verdict.unfinished.append(f"shards/{name}/{increment}")
            else:
                yield f"{len(lost)} kept pairs of {increment} are no training examples"


def _by_increment(store: Store, refs: list[ShardRef]) -> dict[str, list[pa.Table]]:
    """Tables by `<group>/<increment>`; a folder of another depth is nobody's."""
    found: dict[str, list[pa.Table]] = {}
    for ref in refs:
        found.setdefault("/".join(ref.folder.split("/")[2:]), []).append(store.read_table(ref.table))
    return found


def _check_model(store: Store, name: str) -> Iterator[str]:
    if store.local and content_hash(store.local / "models" / name) != name:
        yield "its content isn't what its name says"
