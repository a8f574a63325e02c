"""Blocks of shards on their way to the decoder: one range request each, ahead of the steps, kept while they are needed.

A store that is away for a moment is asked again. The optional cache keeps blocks of far stores on a local disk: a file
each, named by the tar's sha256, so that another tar is never taken for it, and holding its own sha256 before its bytes.
A file that isn't what it says is read anew. Files are renamed into place, so ranks may share a folder; what was used
least recently goes first. Cost: the blocks of two windows of the plan in memory; each rank reads every block.
"""

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pairs.errors import PairmillError
from pairs.store import TEMPORARY, Store, advice
from training.plan import Block, Plan

log = logging.getLogger("pairmill.training")
READS, PAUSE_S = 4, 0.5  # tries of a block, and the first pause between them, which doubles
READERS = 8  # requests at a time
DIGEST = 32  # bytes of a sha256
OURS = re.compile(rf"[0-9a-f]{{32}}-\d+-\d+|{re.escape(TEMPORARY)}.*")
SLACK = 0.05  # share of a cache's size that is written between two looks at what lies there


class Cache:
    """At most about `limit` bytes of blocks in `folder`/pairmill-blocks, which is the cache's own."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.full = folder / "pairmill-blocks", limit, False
        self._lock = threading.Lock()
        with advice(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._room = self._trim()

    def get(self, block: Block) -> bytes | None:
        """The block's bytes, if they lie here whole."""
        path = self._path(block)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        whole = len(data) == DIGEST + block.size and hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]
        return data[DIGEST:] if whole else None

    def put(self, block: Block, data: bytes) -> None:
        """Keeps the bytes. A disk that takes no more ends the keeping, with one warning: nothing is lost by it."""
        if self.full:
            return
        name = ""
        try:
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(name, self._path(block))
        except OSError as error:
            with self._lock:
                told, self.full = self.full, True
            if not told:
                log.warning("the cache %s takes no more blocks: %s", self.folder, error.strerror)
            Path(name).unlink(missing_ok=True) if name else None
        with self._lock:
            self._room -= len(data)
            if self._room < 0:
                self._room = self._trim()

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.tar_sha256[:32]}-{block.start}-{block.size}"

    def _trim(self) -> int:
        """Deletes what was used least recently (unfinished files of killed runs among it) until there is room for a
        share of `limit`; how many bytes may be written before the next look."""
        found = []
        for entry in os.scandir(self.folder):
            try:
                facts = entry.stat()
            except FileNotFoundError:  # another rank's doing
                continue
            if OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        room = int(self.limit * SLACK)
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held + room <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            held -= size
        return room


class Blocks:
    """The encoded images of a plan's rows."""

    def __init__(self, plan: Plan, store: Store, cache: Cache | None = None) -> None:
        self.plan, self.store, self.cache = plan, store, cache
        self._pool = ThreadPoolExecutor(READERS, "read")
        self._held: dict[int, Future[bytes]] = {}
        self._lock, self._last = threading.Lock(), 0

    def look(self, first: int, last: int) -> None:
        """Asks for the blocks of the steps from `first` to the end of the window of `last`, and lets go of others."""
        rows = []
        with self._lock:  # a late step must not let go of what a later one has asked for
            self._last = max(self._last, last)
            while first <= self._last:
                begin, end = self.plan.window_of(first)
                rows.append(self.plan.window(begin, end)[1][first - begin :].ravel())
                first = end
            wanted = dict.fromkeys(self.plan.block_of[np.concatenate(rows)].tolist())
            kept = {number: self._held[number] for number in wanted if number in self._held}
            self._held = kept | {n: self._pool.submit(self._read, n) for n in wanted if n not in kept}

    def image(self, row: int) -> bytes:
        """The row's image, whose step was looked at."""
        number = int(self.plan.block_of[row])
        with self._lock:
            block = self._held[number]
        start = int(self.plan.offsets[row]) - self.plan.blocks[number].start
        return block.result()[start : start + int(self.plan.sizes[row])]

    def _read(self, number: int) -> bytes:
        block = self.plan.blocks[number]
        data = self.cache.get(block) if self.cache else None
        if data is None:
            data = read(self.store, block)
            if self.cache:
                self.cache.put(block, data)
        return data


def read(store: Store, block: Block) -> bytes:
    """The block's bytes. A store that is away for a moment is asked again: pairs must not be lost to its weather."""
    found = ""
    for attempt in range(READS):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            data = store.read(block.shard.tar, block.start, block.size)
            if len(data) == block.size:
                return data
            found = f"{len(data)} of {block.size} bytes from {block.start}"
        except OSError as error:
            found = f"{type(error).__name__}: {error}"
    raise PairmillError(
        expected=f"to read {block.shard.tar}",
        found=f"{found}, {READS} times",
        remedy="mend the store, then run the same command again: it resumes after the last checkpoint",
    )
