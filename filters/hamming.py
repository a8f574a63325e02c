"""All values within a Hamming radius of 64-bit queries, exactly, by four tables of 16-bit chunks.

A value is a row of 64-bit words. The first is looked up; the others, if any, are one long hash that has to be within a
radius of its own, and cost only where the first is near.

Pigeonhole: with radius 4r + a, two values that close agree to within r bits in one of the first a + 1 chunks, or
to within r - 1 bits in one of the others (else they differ in at least 4r + a + 1 bits). So each query probes a few
buckets of each chunk's table, and every candidate is checked by a popcount. At radius 4 that is 20 probes, at radius 8
188: about 150 and 1,400 candidates per query among half a million random values. They are expanded in pieces of
bounded size.
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
    """`values_NW`, uint64, sorted once per chunk of the first word. 16 bytes per value beside it, and 2 MB."""

    def __init__(self, values_NW: np.ndarray) -> None:
        self.values = values_NW
        keys = [chunk(values_NW[:, 0], place) for place in range(CHUNKS)]
        self.order = [np.argsort(key, kind="stable").astype(np.int32) for key in keys]
        self.starts = [np.concatenate([[0], np.cumsum(np.bincount(key, minlength=1 << BITS))]) for key in keys]

    def within(self, queries_QW: np.ndarray, radius: int, confirm: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (query row, value row) that differ in at most `radius` bits of the first word and `confirm` bits of the
        other words together, piece by piece; a pair may come more than once."""
        if not len(self.values):
            return
        for place, masks in enumerate(probes(radius)):
            keys = (chunk(queries_QW[:, 0], place)[:, None] ^ masks[None, :]).ravel().astype(np.int64)
            first = self.starts[place][keys]
            counts = self.starts[place][keys + 1] - first
            for hit in _pieces(np.flatnonzero(counts), counts):
                repeated = np.repeat(hit, counts[hit])
                ends = np.cumsum(counts[hit])
                offsets = np.arange(len(repeated)) - np.repeat(ends - counts[hit], counts[hit])
                rows = self.order[place][first[repeated] + offsets]
                asking = repeated // max(len(masks), 1)
                near = distance(queries_QW[asking, 0], self.values[rows, 0]) <= radius
                asking, rows = asking[near], rows[near]
                near = sum_of_distances(queries_QW[:, 1:], self.values[:, 1:], asking, rows) <= confirm
                yield asking[near], rows[near]


def distance(left_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """Differing bits of 64-bit words, 0 to 64, uint8."""
    return np.bitwise_count(left_N ^ right_N)


def sum_of_distances(left_NW: np.ndarray, right_MW: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Differing bits of the rows `left` and `right` of two tables, over all words; word by word, to hold little."""
    total = np.zeros(len(left), np.int64)
    for word in range(left_NW.shape[1]):
        total += distance(left_NW[left, word], right_MW[right, word])
    return total


def _pieces(hit: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    if not len(hit):
        return []
    number = np.cumsum(counts[hit]) // PIECE
    return np.split(hit, np.flatnonzero(np.diff(number)) + 1)


def earliest(index: HammingIndex, queries_QW: np.ndarray, radius: int, confirm: int) -> np.ndarray:
    """For each query the smallest row of a value that is near, or -1."""
    none = len(index.values)
    found = np.full(len(queries_QW), none, np.int64)
    for asking, rows in index.within(queries_QW, radius, confirm):
        np.minimum.at(found, asking, rows)
    return np.where(found == none, -1, found)


def first_equal(values_NW: np.ndarray) -> np.ndarray:
    """For each row the first row with the same words."""
    order = np.lexsort(values_NW.T)  # stable: of equal rows the first stands first
    ordered = values_NW[order]
    opens = np.ones(len(order), bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[opens][np.cumsum(opens) - 1]
    return first


def leaders(values_NW: np.ndarray, known: int, radius: int, confirm: int = 0, block: int = 2048) -> np.ndarray:
    """For each of the distinct `values_NW` the row of its leader: the earliest leader that is near, or itself.

    Near is what `HammingIndex.within` says. The first `known` values are leaders already. What follows is asked block
    by block: against all leaders so far, then inside the block. Leaders lie in a large index that is rebuilt when the
    small one of recent leaders has grown to a quarter of it, so a value is sorted a few times, not once per block.
    """
    leader = np.arange(len(values_NW))
    main_rows, recent_rows = np.arange(known), np.arange(0)
    main, recent = HammingIndex(values_NW[:known]), HammingIndex(values_NW[:0])
    for start in range(known, len(values_NW), block):
        rows = np.arange(start, min(start + block, len(values_NW)))
        for index, places in ((recent, recent_rows), (main, main_rows)):  # main is earlier, so it has the last word
            found = earliest(index, values_NW[rows], radius, confirm)
            leader[rows[found >= 0]] = places[found[found >= 0]]
        open_rows = rows[leader[rows] == rows]
        leader[open_rows] = open_rows[_inside(values_NW[open_rows], radius, confirm)]
        recent_rows = np.concatenate([recent_rows, rows[leader[rows] == rows]])
        if len(recent_rows) > max(4 * block, len(main_rows) // 4):
            main_rows, recent_rows = np.concatenate([main_rows, recent_rows]), np.arange(0)
            main = HammingIndex(values_NW[main_rows])
        recent = HammingIndex(values_NW[recent_rows])
    return leader


def _inside(values_BW: np.ndarray, radius: int, confirm: int) -> np.ndarray:
    """The leader of each value of one block, where no earlier leader is near."""
    leader, size = np.arange(len(values_BW)), len(values_BW)
    found = HammingIndex(values_BW).within(values_BW, radius, confirm)
    pairs = [(later * size + rows)[rows < later] for later, rows in found]
    near = np.unique(np.concatenate(pairs)) if pairs else np.arange(0)
    later, rows = np.divmod(near, max(size, 1))
    for row, start, end in zip(*_runs(later), strict=True):
        ahead = rows[start:end]
        ahead = ahead[leader[ahead] == ahead]
        leader[row] = ahead[0] if len(ahead) else row
    return leader


def _runs(sorted_N: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    values, starts = np.unique(sorted_N, return_index=True)
    ends = np.append(starts, len(sorted_N))[1:]
    return values.tolist(), starts.tolist(), ends.tolist()
