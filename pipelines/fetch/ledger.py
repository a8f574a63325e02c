"""The ledger: what became of each candidate, a table per shard, keyed like the pairs by the settings of the fetch.

`ledger/<source>-<fetch fingerprint>/<increment>/00000.parquet` has one row per candidate of the shard's block. A fetch
with other settings writes beside it. From it a later increment learns what may be tried again, and when.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pairs.fingerprint import fingerprint
from pairs.recipe import FetchSpec
from pairs.store import Store
from pipelines.fetch import decode
from pipelines.fetch.robots import OPT_OUT, RESERVED

Row = dict[str, Any]
VERSION = 2  # raise it when equal responses give other bytes
ENTERS = ("side_px", "format", "quality", "shard_pairs", "max_bytes", "max_pixels", "min_side_px")
GROWTH = 4  # each failure for a time makes the next wait so many times as long
SAID_NO = OPT_OUT | {RESERVED}  # what a site answered when it was asked: it isn't asked again, whatever the settings


@dataclass(frozen=True)
class FetchCounts:
    """Of a whole increment: `candidates` = `ok` + the sum of `failed` ("status/reason"). `shards` were made now,
    `reused` were there. `success` is the share of ok among what was asked for, refusals left out; 1 for none."""

    candidates: int
    ok: int
    shards: int
    reused: int
    failed: dict[str, int] = field(default_factory=dict)
    requests: int = 0  # sent now, robots.txt included

    @property
    def refused(self) -> int:
        return sum(count for name, count in self.failed.items() if name.startswith("refused/"))

    @property
    def asked(self) -> int:
        """Candidates that nobody refused: without any, `success` says nothing."""
        return self.candidates - self.refused

    @property
    def success(self) -> float:
        return self.ok / self.asked if self.asked else 1.0


def fetch_fingerprint(spec: FetchSpec) -> str:
    """Over the settings that influence the bytes of pair shards, and the versions of this code."""
    settings = {name: getattr(spec, name) for name in ENTERS}
    return fingerprint({"fetch": VERSION, "decode": decode.VERSION, **settings})


def ledger_part(group: str, increment: str, index: int) -> str:
    """`group` is `<source>-<fetch fingerprint>`."""
    return f"ledger/{group}/{increment}/{index:05d}.parquet"


def outcomes(store: Store, folder: str) -> Counter[str]:
    """How many candidates of the ledger below `folder` are "ok" or "status/reason"."""
    counts: Counter[str] = Counter()
    for path in store.files(folder, ".parquet"):
        table = store.read_table(path, ["status", "reason"])
        for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
            counts["ok" if status == "ok" else f"{status}/{reason}"] += 1
    return counts


def count_increment(store: Store, folder: str, made: int, reused: int, requests: int) -> FetchCounts:
    counts = outcomes(store, folder)
    ok = counts.pop("ok", 0)
    return FetchCounts(ok + counts.total(), ok, made, reused, dict(sorted(counts.items())), requests)


def groups(store: Store, source: str) -> list[str]:
    """The ledgers of a source, one per fetch fingerprint."""
    return [name for name in store.folders("ledger") if name.rpartition("-")[0] == source]


def said_no(store: Store, source: str, increment: str) -> dict[str, str]:
    """Of an increment, what the site itself refused when it was asked under whatever settings: reason by url_key."""
    found: dict[str, str] = {}
    for group in groups(store, source):
        for path in store.files(f"ledger/{group}/{increment}", ".parquet"):
            for row in store.read_table(path, ["url_key", "status", "reason"]).to_pylist():
                if row["status"] == "refused" and row["reason"] in SAID_NO:
                    found[row["url_key"]] = row["reason"]
    return found


def taken(store: Store, group: str, increment: str) -> set[str]:
    """The keys that are ok in a group's increments before this one: they are its pairs already."""
    found: set[str] = set()
    for earlier in (name for name in store.folders(f"ledger/{group}") if name < increment):
        for path in store.files(f"ledger/{group}/{earlier}", ".parquet"):
            table = store.read_table(path, ["url_key", "status"])
            found |= set(table.filter(pc.equal(table["status"], "ok"))["url_key"].to_pylist())
    return found


def passing_failures(store: Store, source: str, increment: str, spec: FetchSpec) -> dict[str, float]:
    """Of an increment, what failed for a time: when, in seconds since 1970, by url_key. Told by the ledger of these
    settings; where it has none, by those of others, among which the latest row of a candidate counts."""
    return _failed(_rows(store, "ledger", source, increment, spec))


def tries(
    store: Store, source: str, increment: str, keys: pa.ChunkedArray, spec: FetchSpec
) -> list[tuple[pa.ChunkedArray, dict[str, float]]]:
    """Which of the increment's `keys` were tried when it was cut, and `passing_failures` among them. An increment that
    `compact` made comes once for each cut in which some of its keys were tried that were tried in others too."""
    rows: dict[str, list[Row]] = {}
    for row in _rows(store, "tries", source, increment, spec):
        rows.setdefault(row["increment"], []).append(row)
    told = [(pa.chunked_array([[r["url_key"] for r in rows[cut]]]), _failed(rows[cut])) for cut in sorted(rows)]
    several = {row["url_key"] for cut in rows.values() for row in cut}
    failed = passing_failures(store, source, increment, spec)
    once = keys.filter(pc.invert(pc.is_in(keys, pa.array(sorted(several), pa.string())))) if several else keys
    return [*told, (once, {key: at for key, at in failed.items() if key not in several})]


def _rows(store: Store, kind: str, source: str, increment: str, spec: FetchSpec) -> list[Row]:
    """Rows of the ledger (or of the `tries`) of these settings; where these have no ledger, of all others."""
    mine = f"{source}-{fetch_fingerprint(spec)}"
    chosen = [mine] if store.files(f"ledger/{mine}/{increment}", ".parquet") else groups(store, source)
    paths = [path for group in chosen for path in store.files(f"{kind}/{group}/{increment}", ".parquet")]
    columns = ["url_key", "status", "started_at", *(["increment"] if kind == "tries" else [])]
    return [row for path in paths for row in store.read_table(path, columns).to_pylist()]


def _failed(rows: Iterable[Row]) -> dict[str, float]:
    latest: dict[str, tuple[float, bool]] = {}
    for row in rows:
        at = row["started_at"].timestamp() if row["started_at"] else 0.0
        latest[row["url_key"]] = max(latest.get(row["url_key"], (0.0, False)), (at, row["status"] == "transient"))
    return {key: at for key, (at, failed) in latest.items() if failed}


def due(failures: Iterable[float], spec: FetchSpec) -> bool:
    """Whether what failed at these times may be tried again: after `retry_hours`, then four times as long, …"""
    times = list(failures)
    hours = min(spec.retry_hours * GROWTH ** (len(times) - 1), spec.retry_hours_max)
    return time.time() >= max(times) + hours * 3600
