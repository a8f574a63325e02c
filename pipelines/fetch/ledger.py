"""The ledger: what became of each candidate, a table per shard, keyed like the pairs by the settings of the fetch.

`ledger/<source>-<fetch fingerprint>/<increment>/00000.parquet` has one row per candidate of the shard's block. A fetch
with other settings writes beside it. From it a later increment learns what may be tried again, and when.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
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
EARLIER = "earlier"
ROWS = 50_000  # read at a time
SAID_NO = OPT_OUT | {RESERVED}  # what a site answered when it was asked: it isn't asked again, whatever the settings
WORDS = [EARLIER, *sorted(SAID_NO)]


class Passing(NamedTuple):
    """When something failed for a time, and until when its site then wanted no request (0 where it didn't say). Both in
    seconds since 1970."""

    at: float
    rests_until: float = 0.0


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


@dataclass(frozen=True)
class Settled:
    """What an increment needn't ask for. `keys` are its N url_keys of 16 bytes, sorted; `codes` N uint8, 0 for what is
    open, else 1 + a place in `WORDS`."""

    keys: np.ndarray = field(default_factory=lambda: np.empty(0, "S16"))
    codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    def mark(self, keys: Sequence[str], word: str) -> None:
        """Settles those of `keys` that the increment has."""
        packed = _packed(keys)
        at = np.minimum(np.searchsorted(self.keys, packed), len(self.keys) - 1)
        self.codes[at[self.keys[at] == packed]] = 1 + WORDS.index(word)

    def get(self, key: str) -> str | None:
        """Of one of `keys`, what the site refused before, or "earlier" for a pair that is there already."""
        code = int(self.codes[np.searchsorted(self.keys, _packed([key])[0])]) if len(self.keys) else 0
        return WORDS[code - 1] if code else None


def _packed(keys: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytearray.fromhex("".join(keys)), "S16")


def settled(store: Store, source: str, group: str, increment: str) -> Settled:
    """Reads, of the source's ledgers: what the site itself refused when it was asked under whatever settings; what is
    ok in the group's increments before this one, whose pairs it is already."""
    tables = store.tables(f"candidates/{source}/{increment}/part-00000.parquet", ROWS, ["url_key"])
    found = Settled(np.concatenate([_packed(t["url_key"].to_pylist()) for t in tables]))
    found = replace(found, codes=np.zeros(len(found.keys), np.uint8))
    assert (found.keys[1:] > found.keys[:-1]).all(), "an increment is cut in order of url_key, each once"
    for other in groups(store, source):
        for path in store.files(f"ledger/{other}/{increment}", ".parquet"):
            table = store.read_table(path, ["url_key", "status", "reason"])
            refused = table.filter(pc.equal(table["status"], "refused"))
            for word in SAID_NO.intersection(refused["reason"].unique().to_pylist()):
                found.mark(refused.filter(pc.equal(refused["reason"], word))["url_key"].to_pylist(), word)
    for earlier in (name for name in store.folders(f"ledger/{group}") if name < increment):
        for path in store.files(f"ledger/{group}/{earlier}", ".parquet"):
            table = store.read_table(path, ["url_key", "status"])
            found.mark(table.filter(pc.equal(table["status"], "ok"))["url_key"].to_pylist(), EARLIER)
    return found


def passing_failures(store: Store, source: str, increment: str, spec: FetchSpec) -> dict[str, Passing]:
    """Of an increment, what failed for a time: when, in seconds since 1970, by url_key. Told by the ledger of these
    settings; where it has none, by those of others, among which the latest row of a candidate counts."""
    return _failed(_rows(store, "ledger", source, increment, spec))


def tries(
    store: Store, source: str, increment: str, keys: pa.ChunkedArray, spec: FetchSpec
) -> list[tuple[pa.ChunkedArray, dict[str, Passing]]]:
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
    columns = ["url_key", "status", "started_at", "retry_at", *(["increment"] if kind == "tries" else [])]
    return [row for path in paths for row in store.read_table(path, columns).to_pylist()]


def _failed(rows: Iterable[Row]) -> dict[str, Passing]:
    latest: dict[str, tuple[float, bool, float]] = {}
    for row in rows:
        at, rests = (row[n].timestamp() if row[n] else 0.0 for n in ("started_at", "retry_at"))
        new = at, row["status"] == "transient", rests
        latest[row["url_key"]] = max(latest.get(row["url_key"], (0.0, False, 0.0)), new)
    return {key: Passing(at, rests) for key, (at, failed, rests) in latest.items() if failed}


def due(failures: Iterable[Passing], spec: FetchSpec) -> bool:
    """Whether what failed so may be tried again: after `retry_hours`, then four times as long, …, and not before the
    site said."""
    every = list(failures)
    hours = min(spec.retry_hours * GROWTH ** (len(every) - 1), spec.retry_hours_max)
    return time.time() >= max(*(failure.rests_until for failure in every), max(f.at for f in every) + hours * 3600)
