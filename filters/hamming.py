"""All values within a Hamming radius of 64-bit queries, exactly, by four tables of 16-bit chunks.

Pigeonhole: with radius 4r + a, two values that close agree to within r bits in one of the first a + 1 chunks, or
to within r - 1 bits in one of the others (else they differ in at least 4r + a + 1 bits). So each query probes a few
buckets of each chunk's table, and every candidate is checked by a popcount. At radius 4 that is 20 probes,
about 150 candidates per query among half a million random values. Candidates are expanded in pieces of bounded size.
Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (2014).
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations

import numpy as np

CHUNKS, BITS = 4, 16
PIECE = 1 << 21  # candidates held at a time


def chunk(values_N: np.ndarray, place: int) -> np.ndarray:
    """The 16 bits at `place` (0 to 3) of each value, as uint16."""
    return (values_N >> np.uint64(BITS * place)).astype(np.uint16)


@cache
def probes(radius: int) -> list[np.ndarray]:
    """For each chunk, the masks (uint16) that turn a query's chunk into the buckets to look into."""
    whole, rest = divmod(radius, CHUNKS)
    return [_masks(whole if place <= rest else whole - 1) for place in range(CHUNKS)]


def _masks(bits: int) -> np.ndarray:
    chosen = [places for count in range(bits + 1) for places in combinations(range(BITS), count)]
    return np.array([sum(1 << place for place in places) for places in chosen], np.uint16)


class HammingIndex:
    """`values_N`, uint64, sorted once per chunk. 16 bytes per value and 2 MB."""

    def __init__(self, values_N: np.ndarray) -> None:
        self.values = values_N
        keys = [chunk(values_N, place) for place in range(CHUNKS)]
        self.order = [np.argsort(key, kind="stable").astype(np.int32) for key in keys]
        self.starts = [np.concatenate([[0], np.cumsum(np.bincount(key, minlength=1 << BITS))]) for key in keys]

    def within(self, queries_Q: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (query row, value row) at a distance of at most `radius`, piece by piece; a pair may come twice."""
        if not len(self.values):
            return
        for place, masks in enumerate(probes(radius)):
            keys = (chunk(queries_Q, place)[:, None] ^ masks[None, :]).ravel().astype(np.int64)
            first = self.starts[place][keys]
            counts = self.starts[place][keys + 1] - first
            for hit in _pieces(np.flatnonzero(counts), counts):
                repeated = np.repeat(hit, counts[hit])
                ends = np.cumsum(counts[hit])
                offsets = np.arange(len(repeated)) - np.repeat(ends - counts[hit], counts[hit])
                rows = self.order[place][first[repeated] + offsets]
                asking = repeated // max(len(masks), 1)
                near = np.bitwise_count(queries_Q[asking] ^ self.values[rows]) <= radius
                yield asking[near], rows[near]


def _pieces(hit: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    if not len(hit):
        return []
    number = np.cumsum(counts[hit]) // PIECE
    return np.split(hit, np.flatnonzero(np.diff(number)) + 1)


def earliest(index: HammingIndex, queries_Q: np.ndarray, radius: int) -> np.ndarray:
    """For each query the smallest row of a value within the radius, or -1."""
    none = len(index.values)
    found = np.full(len(queries_Q), none, np.int64)
    for asking, rows in index.within(queries_Q, radius):
        np.minimum.at(found, asking, rows)
    return np.where(found == none, -1, found)


def leaders(values_N: np.ndarray, known: int, radius: int, block: int = 2048) -> np.ndarray:
    """For each of the distinct `values_N` the row of its leader: the earliest leader within the radius, or itself.

    The first `known` values are leaders already. What follows is asked block by block: against all leaders so far,
    then inside the block. Leaders lie in a large index that is rebuilt when the small one of recent leaders has
    grown to a quarter of it, so a value is sorted a few times, not once per block.
    """
    leader = np.arange(len(values_N))
    main_rows, recent_rows = np.arange(known), np.arange(0)
    main, recent = HammingIndex(values_N[:known]), HammingIndex(values_N[:0])
    for start in range(known, len(values_N), block):
        rows = np.arange(start, min(start + block, len(values_N)))
        for index, places in ((recent, recent_rows), (main, main_rows)):  # main is earlier, so it has the last word
            found = earliest(index, values_N[rows], radius)
            leader[rows[found >= 0]] = places[found[found >= 0]]
        open_rows = rows[leader[rows] == rows]
        leader[open_rows] = open_rows[_inside(values_N[open_rows], radius)]
        recent_rows = np.concatenate([recent_rows, rows[leader[rows] == rows]])
        if len(recent_rows) > max(4 * block, len(main_rows) // 4):
            main_rows, recent_rows = np.concatenate([main_rows, recent_rows]), np.arange(0)
            main = HammingIndex(values_N[main_rows])
        recent = HammingIndex(values_N[recent_rows])
    return leader


def _inside(values_B: np.ndarray, radius: int) -> np.ndarray:
    """The leader of each value of one block, where no earlier leader is near."""
    leader = np.arange(len(values_B))
    found = HammingIndex(values_B).within(values_B, radius)
    pairs = [(later * len(values_B) + rows)[rows < later] for later, rows in found]
    near = np.unique(np.concatenate(pairs)) if pairs else np.arange(0)
    later, rows = np.divmod(near, max(len(values_B), 1))
    for row, start, end in zip(*_runs(later), strict=True):
        ahead = rows[start:end]
        ahead = ahead[leader[ahead] == ahead]
        leader[row] = ahead[0] if len(ahead) else row
    return leader


def _runs(sorted_N: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    values, starts = np.unique(sorted_N, return_index=True)
    ends = np.append(starts, len(sorted_N))[1:]
    return values.tolist(), starts.tolist(), ends.tolist()
