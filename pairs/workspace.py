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
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pairs import FORMAT_VERSION
from pairs.errors import PairmillError
from pairs.schemas import TOMBSTONES
from pairs.shard import ShardRef, list_shards
from pairs.store import TEMPORARY, Store, advice

MARK = "workspace.json"


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
                remedy="use the pairmill release that made it, or choose another --workspace",
            )
        if create and store.local and not os.access(store.local, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write here", str(store.local))
        return Workspace(store)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the writers' lock; a second writer gets an error that names the first."""
        if not self.store.local:
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
                raise PairmillError(
                    expected=f"no other writer in {self.store.root}",
                    found=f"the lock is held by {file.read().strip() or 'another process'}",
                    remedy="wait for it to end (`pairmill status` shows it), or choose another --workspace",
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                self.store.sweep()
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
        """Ids that must never come back, by kind (`url_key`, `uid`)."""
        table = self._tombstone_table()
        dead: dict[str, set[str]] = {"url_key": set(), "uid": set()}
        for kind, name in zip(table["kind"].to_pylist(), table["id"].to_pylist(), strict=True):
            dead[kind].add(name)
        return dead

    def bury(self, kind: str, ids: list[str], reason: str) -> None:
        """Adds tombstones; call it under the lock."""
        assert kind in ("url_key", "uid"), kind
        old, dead = self._tombstone_table(), self.tombstones()[kind]
        rows = [{"kind": kind, "id": i, "reason": reason} for i in dict.fromkeys(ids) if i not in dead]
        new = pa.Table.from_pylist(rows, schema=TOMBSTONES)
        self.store.write_table("tombstones.parquet", pa.concat_tables([old, new]))

    def _tombstone_table(self) -> pa.Table:
        path = "tombstones.parquet"
        return self.store.read_table(path).cast(TOMBSTONES) if self.store.has(path) else TOMBSTONES.empty_table()

    def alive(self, table: pa.Table) -> list[bool]:
        """For each row of a table with `uid`, `url_key` and `status`: whether readers may use it."""
        return list(alive(table, self.tombstones()).to_pylist())


def alive(table: pa.Table, dead: Mapping[str, AbstractSet[str]]) -> pa.ChunkedArray:
    """For each row of a table with `uid`, `url_key` and `status`: true where readers may use it; no nulls. `dead` are
    tombstones by kind."""
    living = pc.fill_null(pc.equal(table["status"].cast(pa.string()), "ok"), False)
    for kind, ids in dead.items():
        column = table[kind].cast(pa.string())
        living = pc.and_(living, pc.invert(pc.is_in(column, pa.array(sorted(ids), pa.string()))))
    return living


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
