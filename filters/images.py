"""A shard's images as pixels, decoded ahead in a thread while a model looks at those before (OpenCV lets others run).

What is decoded and not yet looked at is bounded by the longest batch and by `AHEAD_BYTES`, as the pair table tells the
sizes: a model finds its next batch ready, and memory holds about two of them, not a shard's. About 0.4 ms an image of
256 px. Without a model nothing is decoded ahead: where filters are cheap, handing pixels from thread to thread costs
0.15 ms an image and saves nothing while other workers have the other cores. With a guard (`cluster/guard.py`) chunks
are decoded in its process, one at a time; an image that kills it is one that doesn't decode.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np

from filters.measure import Ask, here, isolate
from pairs.shard import Shard

CHUNK_ROWS = 32
AHEAD_BYTES = 256 * 2**20

Pixels = dict[int, np.ndarray | None]  # row → HxWx3 uint8 RGB, None where the image doesn't decode


@dataclass
class Chunk:
    """Some rows' images, the reasons of those that killed their process, and the seconds that decoding took."""

    pixels: Pixels
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0


def decoded(shard: Shard, rows: Sequence[int], ahead_rows: int, ask: Ask) -> Iterator[Chunk]:
    """The images of `rows`, in order; at most `ahead_rows` (and one chunk) are decoded before they are asked for."""
    columns = (shard.table[name].to_pylist() for name in ("image_offset", "image_size", "width", "height"))
    places = list(zip(*columns, strict=True))
    work = partial(_chunk, shard, places, ask)
    chunks = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
    if not ahead_rows or ask is not here:  # a guard answers one question at a time
        yield from map(work, chunks)
        return
    sizes = [sum(3 * (places[i][2] or 0) * (places[i][3] or 0) for i in chunk) for chunk in chunks]
    waiting: deque[tuple[int, Future[Chunk]]] = deque()
    thread = ThreadPoolExecutor(1, "decode")
    try:
        for chunk, size in zip(chunks, sizes, strict=True):
            while waiting and _full(waiting, size, ahead_rows):
                yield waiting.popleft()[1].result()
            waiting.append((size, thread.submit(work, chunk)))
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        thread.shutdown(cancel_futures=True)


def _full(waiting: Sequence[tuple[int, object]], size: int, ahead_rows: int) -> bool:
    too_many = (len(waiting) - 1) * CHUNK_ROWS >= ahead_rows  # the first one is being looked at next
    return too_many or sum(bytes_ for bytes_, _ in waiting) + size > AHEAD_BYTES


def _chunk(shard: Shard, places: Sequence[tuple[int, ...]], ask: Ask, rows: Sequence[int]) -> Chunk:
    started = time.perf_counter()
    failed: dict[int, str] = {}
    encoded = {i: memoryview(shard.tar)[places[i][0] : places[i][0] + places[i][1]] for i in rows}
    if ask is here:
        return Chunk({i: decode(encoded[i]) for i in rows}, failed, time.perf_counter() - started)
    pieces = isolate(lambda some: ask(_decode_all, [bytes(encoded[i]) for i in some]), rows, failed)
    images = iter([image for piece in pieces for image in piece])
    return Chunk({i: None if i in failed else next(images) for i in rows}, failed, time.perf_counter() - started)


def _decode_all(encoded: Sequence[bytes]) -> list[np.ndarray | None]:
    return [decode(data) for data in encoded]


def decode(encoded: bytes | memoryview) -> np.ndarray | None:
    """HxWx3 uint8 RGB, or None where the image doesn't decode."""
    try:
        bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (cv2.error, ValueError):
        return None
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, bgr)
