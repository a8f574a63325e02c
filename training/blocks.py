"""Blocks of shards on their way to the decoder: of each a rank reads what it needs, in one range request, ahead.

A store that is away for a moment is asked again. The optional cache keeps blocks of far stores on a local disk: a file
each, named by the tar's sha256, so that another tar is never taken for it, and holding its own sha256 before its bytes.
A file that isn't what it says is read anew. Files are renamed into place, so ranks may share a folder; what was used
least recently goes first. Cost: the rank's own images of about one window of the plan in memory.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pairs.errors import PairmillError
from pairs.store import TEMPORARY, Store, advice
from training.order import Ints
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
    """The encoded images of the rows that a rank takes, `own` of a step: asked for ahead of the steps, let go after.

    While a window's rows are used up, blocks of the next are asked for at the same pace: about one window's own images
    are held. A row that the next window takes again stays.
    """

    def __init__(self, plan: Plan, store: Store, own: Callable[[int], Ints], cache: Cache | None = None) -> None:
        self.plan, self.store, self.own, self.cache = plan, store, own, cache
        self._lock = threading.Lock()
        self._span = 0, 0

    @contextlib.contextmanager
    def over(self, start: int, end: int) -> Iterator[None]:
        """Within, the steps [start, end) are served, each once."""
        self._span, self._steps = (start, end), dict[int, Ints]()
        self._held, self._uses = dict[int, Future[dict[int, bytes]]](), Counter[int]()
        self._windows: deque[tuple[int, int, deque[Ints]]] = (
            deque()
        )  # first step, blocks at first, blocks yet to ask for
        self._known = start  # steps before it have their rows here
        with ThreadPoolExecutor(READERS, "read") as self._pool:
            try:
                yield
            finally:
                self._pool.shutdown(cancel_futures=True)
                self._span, self._held = (0, 0), {}

    def serves(self, step: int) -> bool:
        return self._span[0] <= step < self._span[1]

    def look(self, step: int) -> None:
        """Asks for all blocks of the step's window that weren't asked for yet."""
        with self._lock:
            while self._known <= self.plan.window_of(step)[1] and self._known < self._span[1]:
                self._learn()  # the next window too: what it takes again isn't let go
            for first, _, blocks in self._windows:
                if first <= step:
                    self._ask(blocks, len(blocks))

    def image(self, row: int) -> bytes:
        """The row's image, whose step was looked at."""
        with self._lock:
            held = self._held[row]
        return held.result()[row]

    def done(self, step: int) -> None:
        """Lets go of the step's rows, and asks for as large a share of the next window's blocks as was used of this."""
        with self._lock:
            for row in self._steps.pop(step).tolist():
                self._uses[row] -= 1
                if not self._uses[row]:
                    del self._uses[row]
                    self._held.pop(row).result().pop(row)
            first, end = self.plan.window_of(step)
            left = sum(other in self._steps for other in range(first, end)) / (end - first)
            for begin, count, blocks in self._windows:
                if begin == end:
                    self._ask(blocks, len(blocks) - int(count * left))
            while self._windows and self._windows[0][0] < first:
                self._windows.popleft()

    def _learn(self) -> None:
        """Takes in the next window's rows, as far as the span goes."""
        first, end = self.plan.window_of(self._known)
        own = {step: self.own(step) for step in range(self._known, min(end, self._span[1]))}
        self._steps |= own
        self._uses.update(row for rows in own.values() for row in rows.tolist())
        rows = np.unique(np.concatenate([*own.values()]))
        blocks = deque(np.split(rows, np.flatnonzero(np.diff(self.plan.block_of[rows])) + 1))
        self._windows.append((first, len(blocks), blocks))
        self._known = min(end, self._span[1])

    def _ask(self, blocks: deque[Ints], count: int) -> None:
        """For the rows of the next `count` of the blocks: one request each, of what isn't here."""
        for _ in range(count):
            missing = [row for row in blocks.popleft().tolist() if row not in self._held]
            if missing:
                self._held |= dict.fromkeys(missing, self._pool.submit(self._read, missing))

    def _read(self, rows: list[int]) -> dict[int, bytes]:
        """The images of rows of one block. A cache takes in the whole of it; else only their range is read."""
        block = self.plan.blocks[int(self.plan.block_of[rows[0]])]
        starts, sizes = self.plan.offsets[rows], self.plan.sizes[rows]
        if self.cache:
            data = self.cache.get(block)
            if data is None:
                data = read(self.store, block)
                self.cache.put(block, data)
        else:
            start, end = int(starts.min()), int((starts + sizes).max())
            block = dataclasses.replace(block, start=start, size=end - start)
            data = read(self.store, block)
        places = (starts - block.start).tolist()
        return {row: data[at : at + size] for row, at, size in zip(rows, places, sizes.tolist(), strict=True)}


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
