"""Takedown: what is asked to be forgotten is gone from every reader at once, and from every byte soon after.

Tombstones come first. Then, under the workspace's lock, whatever was made of the pairs is rewritten without them, what
is derived before what it is derived from, so that a killed takedown still knows what to look for. It is done when
`forgotten/<number>.json` says so: which ids, and which trainings consumed them, but nothing of what they showed.
Cost: the key columns of all tables are read; only shards and tables that hold one of the pairs are written.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.reduce import ASKED
from filters.score_tables import without_errors
from pairs.errors import PairmillError
from pairs.identity import ID_LENGTH, held_out, local_key, url_key
from pairs.shard import list_shards, rewrite_shard
from pairs.store import Store, table_metadata
from pairs.workspace import KINDS, Dead, Workspace, host_of, refused
from pipelines.fetch.policies import RESTS, load_rests, save_rests
from pipelines.models import trained
from pipelines.scrub import needles, scrub
from training.config import Pin, TrainConfig
from training.plan import taken
from training.tables import make_plan, pinned_path

Record = dict[str, Any]
KEYED = {  # tables by url_key, and which of their columns say more of a pair
    "candidates": ("url", "texts"),
    "ledger": ("url", "sha256", "uid"),
    "tries": ("url", "sha256", "uid"),
    "pairs": ("url", "sha256", "uid", "text", "texts"),
}


@dataclass
class Found:
    """What tombstones mean in a workspace: keys and uids, and the addresses and texts that still stand in tables."""

    keys: set[str]
    uids: set[str]
    urls: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)


def forget(
    workspace: Workspace, asked: Mapping[str, Sequence[str]], reason: str, waiting: Callable[[str], None] | None
) -> Record:
    """Forgets what `asked` names (lines by option: urls, uids, hosts, sha256). Waits for other writers, telling
    `waiting` their name; without it the next writer does the rewriting. Returns the audit record's facts."""
    dead = _parse(asked)
    workspace.bury_all(dead, reason)  # a damaged table can't hold this back
    meant = _look_up_again(workspace.store, dead)
    workspace.bury_all({"url_key": meant.keys, "uid": meant.uids}, reason)
    if waiting is None:
        return {"state": "buried", "url_keys": len(meant.keys), "uids": len(meant.uids)}
    with workspace.lock(waiting):
        return finish(workspace, reason, set(asked.get("urls", ())), always=True) or {"state": "nothing to forget"}


def tell(facts: Record, as_json: bool) -> None:
    """Prints what a takedown did."""
    if as_json:
        print(json.dumps(facts))
        return
    ids = facts.get("ids", {})
    print(f"{facts['state']}: " + ", ".join(f"{len(names)} {kind}" for kind, names in ids.items()) if ids else facts)
    if "rewritten" in facts:
        print("rewritten: " + ", ".join(f"{count} rows in {kind}" for kind, count in facts["rewritten"].items()))
    for training in facts.get("trainings", []):
        known = [count for count in training["pairs"].values() if count is not None]
        how = f"took {len(known)} of them {sum(known)} times" if known else f"may have read {len(training['pairs'])}"
        print(f"{training['training']} {how}; models {', '.join(training['models'].values()) or 'none yet'}")


def finish(
    workspace: Workspace, reason: str = "", urls: AbstractSet[str] = frozenset(), always: bool = False
) -> Record:
    """Rewrites what tombstones mean, as far as no record says that it is done; with `always` all of it is looked
    through again. Call it under the lock. Returns the record's facts, nothing where there was nothing to do."""
    store, dead = workspace.store, workspace.tombstones()
    records = {path: json.loads(store.read(path)) for path in store.files("forgotten", ".json")}
    done = {kind: {i for r in records.values() if r["state"] == "done" for i in r["ids"][kind]} for kind in KINDS}
    if all(dead[kind] <= done[kind] for kind in KINDS) and not (always and any(dead.values())):
        return {}
    found = look_up(store, dead)
    found.urls |= urls
    workspace.bury_all({"url_key": found.keys, "uid": found.uids}, reason or "with its host, bytes or address")
    dead = workspace.tombstones()
    new = {kind: sorted(dead[kind] - done[kind]) for kind in KINDS}
    path, record = _draft(workspace, records, new, found, done, reason)
    scrub(workspace, needles(found.urls, found.texts | _captions(store, found.uids)), dead, found.uids)
    save_rests(store, load_rests(store), dead)
    cached = [path for path in store.files("cache") if path != RESTS]
    for made in (*cached, ASKED, *(f"crawl/{c}/{part}" for c in _crawls(store) for part in ("merge", "files"))):
        store.delete(made, recursive=True)  # what is in it can be had again
    _canaries(store, found)
    rewrote = Counter({kind: _shards(store, kind, found.uids) for kind in ("shards",)})
    for kind in ("selections", "scores"):
        rewrote[kind] = sum(_blank(store, p, "uid", found.uids, _SELECTED) for p in store.files(kind, ".parquet"))
    rewrote["pairs"] = _shards(store, "pairs", found.uids)
    rewrote["pinned"] = sum(_blank(store, p, "uid", found.uids, _PINNED) for p in store.files("pinned", ".parquet"))
    for kind in ("tries", "ledger", "candidates"):
        rewrote[kind] = sum(_blank(store, p, "url_key", found.keys, _KEPT) for p in store.files(kind, ".parquet"))
    facts = record | {"state": "done", "ended": _now(), "rewritten": dict(rewrote)}
    if path:
        store.write(path, json.dumps(facts, indent=1))
    return facts


def _crawls(store: Store) -> list[str]:
    return [f"{source}/{name}" for source in store.folders("crawl") for name in store.folders(f"crawl/{source}")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parse(asked: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Tombstones by kind of what was asked for; a line that can't be meant is an error before anything is written."""
    dead: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for option, (kind, read) in OPTIONS.items():
        dead[kind] |= {read(line.strip()) for line in asked.get(option, ())}
    return dead


def _hex(option: str, digits: int) -> Callable[[str], str]:
    def read(line: str) -> str:
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", line.lower()):
            raise _wrong(option, line, f"{digits} hex digits a line")
        return line.lower()

    return read


def _key(line: str) -> str:
    if line.lower().startswith(("http://", "https://")):
        return url_key(line)
    source, colon, path = line.partition(":")
    if not colon or not path:
        raise _wrong("urls", line, "an http address a line, or <source>:<relative path> of a local one")
    return local_key(source, path)


def _host(line: str) -> str:
    host = host_of(line if "://" in line else f"http://{line}/")
    if not host or ("://" not in line and re.search(r"[\s/@?#]", line)):
        raise _wrong("hosts", line, "a host's name a line, such as example.org (it means all below it too)")
    return host


def _wrong(option: str, line: str, expected: str) -> PairmillError:
    return PairmillError(expected=f"in --{option} {expected}", found=repr(line[:200]), remedy="correct this line")


OPTIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "urls": ("url_key", _key),
    "uids": ("uid", _hex("uids", ID_LENGTH)),
    "hosts": ("host", _host),
    "sha256": ("sha256", _hex("sha256", 64)),
}


def _look_up_again(store: Store, dead: Dead, tries: int = 3) -> Found:
    """`look_up` without the lock: what it has listed may be merged into other files before it is read."""
    try:
        return look_up(store, dead)
    except FileNotFoundError:
        if tries == 1:
            raise
    return _look_up_again(store, dead, tries - 1)


def look_up(store: Store, dead: Dead) -> Found:
    """All keys and uids that tombstones mean, with the addresses and texts of what still stands."""
    found = Found(set(dead["url_key"]), set(dead["uid"]))
    if not any(dead.values()):
        return found
    for kind, columns in KEYED.items():
        for _, table in _tables(store, kind, [name for name in columns if name not in ("text", "texts")]):
            found.keys |= set(table.filter(_meant(table, dead))["url_key"].to_pylist())
    for kind, columns in KEYED.items():
        for path, table in _tables(store, kind, [name for name in columns if name not in ("text", "texts")]):
            rows = table.filter(_among(table["url_key"], found.keys))
            found.uids |= set(pc.drop_null(rows["uid"]).to_pylist()) if "uid" in columns else set()
            found.urls |= set(pc.drop_null(rows["url"]).to_pylist())
            if pc.any(rows["url"].is_valid()).as_py() and "texts" in columns:
                found.texts |= _texts(store.read_table(path, ["url_key", "texts"]), found.keys)
    return found


def _tables(store: Store, kind: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    for path in store.files(kind, ".parquet"):
        yield path, store.read_table(path, ["url_key", *columns])


def _among(column: pa.ChunkedArray, ids: AbstractSet[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(ids), pa.string()))


def _meant(table: pa.Table, dead: Dead) -> pa.ChunkedArray:
    """Which rows tombstones mean: by key, pair, bytes or host."""
    mask = _among(table["url_key"], dead["url_key"])
    for kind in ("uid", "sha256"):
        if kind in table.column_names and dead[kind]:
            mask = pc.or_(mask, _among(table[kind], dead[kind]))
    if dead["host"]:
        hosts = {**dead, "url_key": frozenset[str]()}
        mask = pc.or_(mask, pa.array([refused(hosts, "", u) for u in table["url"].to_pylist()], pa.bool_()))
    return mask


def _texts(table: pa.Table, keys: AbstractSet[str]) -> set[str]:
    rows = table.filter(_among(table["url_key"], keys))["texts"].to_pylist()
    return {entry["text"] for texts in rows for entry in texts or []}


def _captions(store: Store, uids: AbstractSet[str]) -> set[str]:
    """The synthetic texts of the pairs."""
    made: set[str] = set()
    for name in store.folders("scores"):
        for path in store.files(f"scores/{name}", ".parquet"):
            if "texts" not in pq.read_schema(io.BytesIO(store.read(path))).names:
                break
            table = store.read_table(path, ["uid", "texts"])
            rows = table.filter(_among(table["uid"], uids))["texts"].to_pylist()
            made |= {text for texts in rows for text in texts or () if isinstance(text, str)}
    return made


def _draft(
    workspace: Workspace,
    records: Mapping[str, Record],
    new: Mapping[str, list[str]],
    found: Found,
    done: Dead,
    reason: str,
) -> tuple[str, Record]:
    """The record, written before anything is: which trainings consumed the pairs can't be told afterwards. A takedown
    that was killed goes on with its own. No path where nothing is new."""
    path, draft = next(((p, r) for p, r in records.items() if r["state"] != "done"), ("", {}))
    if not any(new.values()):
        return path, draft
    known = {uid for ids in draft.get("ids", {}).values() for uid in ids}
    uids = (found.uids - set(done["uid"])) - known
    told = draft or {"state": "rewriting", "reason": reason, "began": _now(), "trainings": []}
    told = told | {"ids": dict(new), "trainings": told["trainings"] + consumers(workspace, uids, done)}
    path = path or f"forgotten/{len(records):04d}.json"
    workspace.store.write(path, json.dumps(told, indent=1))
    return path, told


def consumers(workspace: Workspace, uids: AbstractSet[str], before: Dead) -> list[Record]:
    """Each training, finished or not, that had one of `uids` to read: how often it took each, by its plan, made again
    with the tombstones of `before`; null where only its pinned shards tell that it may have."""
    store, told = workspace.store, []
    for path in store.files("runs", "/config.json") if uids else []:
        config = json.loads(store.read(path))
        if "shards" not in config or "apart" not in config:
            continue
        pinned = [pinned_path(store, Pin(**pin)) for pin in config["shards"]]
        tables = [store.read_table(p, ["uid"]) for p in pinned if store.has(p)]
        met = {u for t in tables for u in t.filter(_among(t["uid"], uids))["uid"].to_pylist()} - set(config["apart"])
        folder = path.removesuffix("/config.json")
        record = trained(workspace, folder.rpartition("/")[2]) or {}
        if "word_steps" in config["spec"]:  # the small BLIP passes over held-out pairs, wherever they lie
            met = {uid for uid in met if not held_out(uid)}
        taken = _taken(store, record, met, before) if met else {}
        if taken:
            told.append(
                {"training": folder, "models": record.get("models", {}), "finished": bool(record), "pairs": taken}
            )
    return told


def _taken(store: Store, record: Record, uids: AbstractSet[str], dead: Dead) -> dict[str, int | None]:
    """How often a training took each of the pairs."""
    unknown: dict[str, int | None] = dict.fromkeys(sorted(uids))
    if "train_config" not in record:
        return unknown
    config = TrainConfig(store=store.root, out_dir="", **record["train_config"])
    try:
        plan = make_plan(store, config.shards, config.spec, config.apart, dead)[0]
    except PairmillError:  # its shards were rewritten since
        return unknown
    if plan.fingerprint != record["result"]["plan"]:
        return unknown
    times = Counter(uid for _, uid in taken(plan, uids, config.spec.steps))
    return dict(sorted(times.items()))


def _canaries(store: Store, found: Found) -> None:
    """Canaries go by the shard: with another origin they are others, so the next run makes new ones anyway. The table
    goes last: it is what the shard is found by."""
    for ref in list_shards(store, "canaries"):
        table = store.read_table(ref.table, ["source_uid", "text"])
        texts = found.texts if ref.group.startswith("swapped_text-") else set()
        if pc.any(pc.or_(_among(table["source_uid"], found.uids), _among(table["text"], texts))).as_py():
            for name in store.folders("scores"):
                store.delete(f"scores/{name}/{ref.group}", recursive=True)
            store.delete(ref.tar)
            store.delete(ref.table)


def _shards(store: Store, kind: str, uids: AbstractSet[str]) -> int:
    """Rewrites the shards of a kind that hold one of the pairs; returns the pairs taken out."""
    return sum(
        rewrite_shard(store, ref, uids)
        for ref in list_shards(store, kind)
        if pc.any(_among(store.read_table(ref.table, ["uid"])["uid"], uids)).as_py()
    )


_KEPT: dict[str, Any] = {"url_key": None, "status": None, "reason": None, "increment": None}
_PINNED: dict[str, Any] = {"uid": None, "url_key": None, "status": "forgotten"}
_SELECTED: dict[str, Any] = {"uid": None, "kept": False, "dropped_by": "forgotten", "would_drop": ["forgotten"]}


def _blank(store: Store, path: str, by: str, ids: AbstractSet[str], kept: Mapping[str, Any]) -> int:
    """Empties the rows of `ids` (of the column `by`) but for `kept`: columns that stay (None), or what they say then.
    Returns how many weren't empty. The metadata lose their errors."""
    gone = _among(store.read_table(path, [by])[by], ids)
    if not pc.any(gone).as_py():
        return 0
    table = store.read_table(path)
    rows = table.filter(gone)
    stay = [name for name, value in kept.items() if value is None and name in table.column_names]
    blank = {name: kept.get(name) for name in table.column_names}
    wanted = [blank | {name: row[name] for name in stay} for row in rows.to_pylist()]
    new = pa.Table.from_pylist(wanted, schema=table.schema)
    changed = sum(a != b for a, b in zip(rows.to_pylist(), wanted, strict=True))
    facts = without_errors(table_metadata(table), set(pc.indices_nonzero(gone).to_pylist()))
    if changed or facts != table_metadata(table):  # of a row that couldn't be measured only the error tells
        order = pc.cumulative_sum(pc.cast(gone, pa.int64())).to_numpy()
        mask = gone.to_numpy().astype(bool)
        places = np.where(mask, table.num_rows + order - 1, np.arange(table.num_rows))
        joined = pa.concat_tables([table.replace_schema_metadata(None), new.replace_schema_metadata(None)])
        store.write_table(path, joined.take(pa.array(places)).combine_chunks(), facts)
    return changed
