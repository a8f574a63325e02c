"""Which program of the fused kernel computes what: lists of tiles, made on the host from lengths alone.

A short segment (of at most 64 queries and keys) lies whole in one tile of 16, 32 or 64 rows, with its neighbours where
they fit: six captions of 10 tokens share a tile, kept apart by the bounds of their rows. A long one is cut into tiles
of 64 rows and a rest in the smallest tile that holds it: 197 tokens (14 × 14 patches and a class token) are 3 × 64 + 16
rows, where tiles of 128 compute 256. A caption of 25 costs 128 × 128 cells in a library's kernel and 1,024 here.
Cost: 2 µs for a short segment, 20 µs for a long one, once per layout.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from training.attention.layout import Layout, Run

TILES = (16, 32, 64)  # rows; tensor cores take no fewer than 16
START = 1024  # what starting a program costs, in cells of scores: makes very short segments share larger tiles
Tile = tuple[int, int, int, int]  # first and end of its own tokens, then of those of the other side that it looks at


class Schedule(NamedTuple):
    """Tiles by their rows, int32 (tiles, 4) on the device. `short`, with all their keys in one tile; the rest twice:
    `queries` tiles with the keys they see, `keys` tiles with the queries that see them."""

    short: dict[int, Tensor]
    queries: dict[int, Tensor]
    keys: dict[int, Tensor]
    cells: int  # scores that a forward pass computes; `Layout.visible` of them are useful


def schedule(layout: Layout) -> Schedule:
    """The layout's tiles on its device; made once, at the first call."""
    found: Schedule = layout.recalled("schedule", _schedule)
    return found


def _schedule(layout: Layout) -> Schedule:
    short, queries, keys = (defaultdict[int, list[Tile]](list) for _ in range(3))
    start = start_k = 0
    for run in layout.segments():
        if max(run.length, run.keys) <= TILES[-1]:
            _join(short[_rows(max(run.length, run.keys))], run, start, start_k)
        else:
            for first, end in _cuts(run.length):
                last_key = min(max(end, run.prefix), run.keys)
                tile = (start + first, start + end, start_k, start_k + last_key)
                queries[_fit(end - first)].append(tile)
            for first, end in _cuts(run.keys):
                since = 0 if first < run.prefix else first
                keys[_fit(end - first)].append((start_k + first, start_k + end, start + since, start + run.length))
        start, start_k = start + run.length, start_k + run.keys
    cells = sum(rows * rows * len(tiles) for rows, tiles in short.items())
    cells += sum(rows * covered(end - first) for rows, tiles in queries.items() for *_, first, end in tiles)
    short_, queries_, keys_ = _moved([short, queries, keys], layout.cu_seqlens.device)
    return Schedule(short_, queries_, keys_, cells)


def covered(length: int, block: int = TILES[-1]) -> int:
    """Columns computed for `length` of them: whole blocks, and a rest of at most half a block in steps of 16."""
    rest = length % block
    return length - rest + (-(-rest // 16) * 16 if rest <= block // 2 else block)


@functools.cache
def _rows(length: int) -> int:
    """The tile in which segments of this length cost least each."""
    fitting = [rows for rows in TILES if rows >= length]
    return min(fitting, key=lambda rows: (rows * rows + START) / (rows // length))


def _fit(length: int) -> int:
    return next(rows for rows in TILES if rows >= length)


def _join(tiles: list[Tile], run: Run, start: int, start_k: int) -> None:
    """Adds the segment to the last tile, where it is its neighbour and fits, else to a new one."""
    rows = _rows(max(run.length, run.keys))
    end, end_k = start + run.length, start_k + run.keys
    if tiles and tiles[-1][1] == start and max(end - tiles[-1][0], end_k - tiles[-1][2]) <= rows:
        tiles[-1] = (tiles[-1][0], end, tiles[-1][2], end_k)
    else:
        tiles.append((start, end, start_k, end_k))


def _cuts(length: int) -> Iterator[tuple[int, int]]:
    # 197 is cut at 0, 64, 128, 192 and 197.
    return itertools.pairwise([*range(0, length, TILES[-1]), length])


def _moved(groups: list[defaultdict[int, list[Tile]]], device: torch.device) -> list[dict[int, Tensor]]:
    """The lists as tensors, sent to the device in one piece."""
    flat = [tile for group in groups for tiles in group.values() for tile in tiles]
    parts = iter(torch.tensor(flat, dtype=torch.int32).to(device, non_blocking=True).split(
        [len(tiles) for group in groups for tiles in group.values()]
    ))  # fmt: skip
    return [{rows: next(parts) for rows in group} for group in groups]
