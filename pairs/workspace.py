"""The workspace: one folder that holds everything a recipe has made, and the lock that lets one writer in.

`workspace.json` names the format's version; another version is refused. The lock is an flock on local disk:
the kernel drops it with the process, so a killed run never leaves a stale one. Other stores hold no lock
of their own; one writer at a time is then the caller's promise, and the lock says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from pairs import FORMAT_VERSION
from pairs.errors import PairmillError
from pairs.identity import canonical_url
from pairs.increments import settle
from pairs.schemas import TOMBSTONES
from pairs.shard import ShardRef, list_shards
from pairs.store import TEMPORARY, Store, advice

MARK = "workspace.json"
KINDS = ("url_key", "uid", "host", "sha256")  # of tombstones: an address, a pair, a host with all below it, image bytes
Dead = Mapping[str, AbstractSet[str]]


class Workspace:
    """The layout of DESIGN's "On disk" over a Store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"Workspace({self.store.root!r})"

    @staticmethod
    def open(root: str | Path, create: bool = False) -> "Workspace":
        """Opens the workspace at `root` (a path or an fsspec URL)."""
        store = Store(root)
        with advice(store.root):
            return Workspace._open(store, root, create)

    @staticmethod
    def _open(store: Store, root: str | Path, create: bool) -> "Workspace":
        if not store.has(MARK):
            if not create:
                raise PairmillError(
                    expected=f"a pairmill workspace at {root}",
                    found="no workspace.json there",
                    remedy="check --workspace, or make one with `pairmill run RECIPE`",
                )
            if _occupied(store):
                raise PairmillError(
                    expected=f"an empty or new folder at {root}",
                    found="other files and no workspace.json",
                    remedy="choose another --workspace",
                )
            store.write(MARK, json.dumps({"format": FORMAT_VERSION}))
        mark = store.read(MARK)
        if (version := _version(mark)) != FORMAT_VERSION:
            raise PairmillError(
                expected=f"a workspace of format {FORMAT_VERSION}",
                found=f"format {version} at {root}" if version else f"{MARK} with {mark[:80]!r} at {root}",
                remedy="use the pairmill release that made it, or choose another --workspace: the recipe then fetches "
                "anew, and what was forgotten must be forgotten there first (tombstones.parquet names it)",
            )
        if create and store.local and not os.access(store.local, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write here", str(store.local))
        return Workspace(store)

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Holds the writers' lock. A second writer gets an error that names the first, or with `waiting`, which is told
        the name, waits for it."""
        if not self.store.local:
            settle(self.store)
            yield
            return
        path = self.store.local / ".lock"
        with advice(str(path)):
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if waiting is None:
                    raise PairmillError(
                        expected=f"no other writer in {self.store.root}",
                        found=f"the lock is held by {holder}",
                        remedy="wait for it to end (`pairmill status` shows it), or choose another --workspace",
                    ) from None
                waiting(holder)
                fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                self.store.sweep()
                settle(self.store)
                yield
            finally:
                file.truncate(0)

    def increments(self, source: str) -> list[str]:
        """Names of the source's increments whose candidates are cut, in order."""
        paths = self.store.files(f"candidates/{source}", "part-00000.parquet")
        return [path.split("/")[2] for path in paths]

    def pair_shards(self, source: str, fingerprint: str) -> list[ShardRef]:
        """The source's complete pair shards under a fetch fingerprint, in order of increment and index."""
        return list_shards(self.store, f"pairs/{source}-{fingerprint}")

    def tombstones(self) -> dict[str, set[str]]:
        """What must never come back: ids by kind (`KINDS`)."""
        table = self._tombstone_table()
        dead: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for kind, name in zip(table["kind"].to_pylist(), table["id"].to_pylist(), strict=True):
            dead[kind].add(name)
        return dead

    def bury(self, kind: str, ids: Iterable[str], reason: str) -> None:
        """Adds tombstones of one kind."""
        self.bury_all({kind: ids}, reason)

    def bury_all(self, ids: Mapping[str, Iterable[str]], reason: str) -> None:
        """Adds tombstones by kind, all at once. They have a lock of their own: a takedown waits for no writer."""
        assert set(ids) <= set(KINDS), ids
        with self._burying():
            old, dead = self._tombstone_table(), self.tombstones()
            new = {(kind, i) for kind, names in ids.items() for i in names if i not in dead[kind]}
            rows = [{"kind": kind, "id": i, "reason": reason} for kind, i in sorted(new)]
            if rows:
                added = pa.Table.from_pylist(rows, schema=TOMBSTONES)
                self.store.write_table("tombstones.parquet", pa.concat_tables([old, added]))

    @contextlib.contextmanager
    def _burying(self) -> Iterator[None]:
        if not self.store.local:
            yield
            return
        with (self.store.local / ".tombstones.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tombstone_table(self) -> pa.Table:
        path = "tombstones.parquet"
        return self.store.read_table(path).cast(TOMBSTONES) if self.store.has(path) else TOMBSTONES.empty_table()

    def alive(self, table: pa.Table) -> list[bool]:
        """For each row of a table with `uid`, `url_key` and `status`: whether readers may use it."""
        return list(alive(table, self.tombstones()).to_pylist())


def alive(table: pa.Table, dead: Dead) -> pa.ChunkedArray:
    """For each row of a table with `uid`, `url_key` and `status`: true where readers may use it; no nulls. `dead` are
    tombstones by kind; those of hosts and bytes have been turned into `url_key` and `uid` where there were pairs."""
    living = pc.fill_null(pc.equal(table["status"].cast(pa.string()), "ok"), False)
    for kind in ("url_key", "uid"):
        column = table[kind].cast(pa.string())
        living = pc.and_(living, pc.invert(pc.is_in(column, pa.array(sorted(dead.get(kind, ())), pa.string()))))
    return living


def refused(dead: Dead, key: str, url: str | None) -> bool:
    """Whether the address `url` of key `key` must not be asked for: it is forgotten, or its host or one above it is."""
    if key in dead["url_key"] or not dead["host"] or not url:
        return key in dead["url_key"]
    parts = host_of(url).split(".")
    return any(".".join(parts[start:]) in dead["host"] for start in range(len(parts)))


def host_of(url: str) -> str:
    """The host of an http address in lower case, without port; empty for a local source's path or a broken address."""
    try:
        parts = urlsplit(canonical_url(url))
        return (parts.hostname or "").rstrip(".") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def _occupied(store: Store) -> bool:
    """Whether something else lies at the root; what a killed `open` left behind doesn't count."""
    root = store.full("")
    if not store.fs.exists(root):
        return False
    names = (
        []
        if store.fs.isfile(root)
        else [name.rstrip("/").rsplit("/", 1)[-1] for name in store.fs.ls(root, detail=False)]
    )
    return store.fs.isfile(root) or not all(name.startswith(TEMPORARY) for name in names)


def _version(mark: bytes) -> object:
    try:
        return json.loads(mark)["format"]
    except (ValueError, LookupError, TypeError):
        return None
