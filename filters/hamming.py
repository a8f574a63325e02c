"""All values within a Hamming radius of 64-bit queries, exactly, by tables of a few of their bits.

A value is a row of 64-bit words. The first is looked up; the others, if any, are one long hash that has to be within a
radius of its own, and cost only where the first is near.

Pigeonhole with m chunks of bits: with radius mr + a, two values that close agree to within r bits in one of the first
a + 1 chunks, or to within r - 1 bits in one of the others (else they differ in at least mr + a + 1 bits). So each query
probes a few buckets of each chunk's table, and every candidate is checked by a popcount. There are 4 chunks of 16 bits,
or for many values 3 of 22, 21 and 21, whose buckets stay short: at radius 4 that is 20 or 46 probes, and among four
million values 1,200 or 90 candidates per query. They are expanded in pieces of bounded size.
Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (2014).
"""

from functools import cache
from itertools import combinations

import numpy as np

from filters import leaders as by_leaders
from filters.leaders import Ask, Pairs, expand

FEW, MANY = (16, 16, 16, 16), (22, 21, 21)  # widths of the chunks, from the lowest bit on
MANY_VALUES = 1 << 18
ASKED = 1 << 20  # probes at a time
SCATTER = sorted(range(64), key=lambda bit: (bit // 8 + bit % 8) % 4)


@cache
def probes(radius: int, widths: tuple[int, ...]) -> list[np.ndarray]:
    """For each chunk, the masks (int64) that turn a query's chunk into the buckets to look into."""
    whole, rest = divmod(radius, len(widths))
    return [_masks(whole if place <= rest else whole - 1, width) for place, width in enumerate(widths)]


def _masks(bits: int, width: int) -> np.ndarray:
    chosen = [places for count in range(bits + 1) for places in combinations(range(width), count)]
    return np.array([sum(1 << place for place in places) for places in chosen], np.int64)


class HammingIndex:
    """`values_NW`, uint64, sorted once per chunk of the first word. 12 to 16 bytes per value beside it, and 1 or
    32 MB."""

    def __init__(self, values_NW: np.ndarray) -> None:
        self.values = values_NW
        self.widths = FEW if len(values_NW) < MANY_VALUES else MANY
        keys = [self._chunk(values_NW[:, 0], place) for place in range(len(self.widths))]
        self.order = [np.argsort(key, kind="stable").astype(np.int32) for key in keys]
        counts = [np.bincount(key, minlength=1 << width) for key, width in zip(keys, self.widths, strict=True)]
        self.starts = [np.concatenate([[0], np.cumsum(count)]).astype(np.int32) for count in counts]

    def _chunk(self, values_N: np.ndarray, place: int) -> np.ndarray:
        shift, width = sum(self.widths[:place]), self.widths[place]
        key = (values_N >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        return key.astype(np.uint16 if width == 16 else np.int32)

    def within(self, queries_QW: np.ndarray, radius: int, confirm: int = 0) -> Pairs:
        """Pairs (query row, value row) that differ in at most `radius` bits of the first word and `confirm` bits of the
        other words together, piece by piece; a pair may come more than once."""
        if not len(self.values):
            return
        for place, masks in enumerate(probes(radius, self.widths)):
            step = max(ASKED // max(len(masks), 1), 1)
            for start in range(0, len(queries_QW), step):
                yield from self._probe(queries_QW, start, start + step, place, masks, radius, confirm)

    def _probe(
        self, queries_QW: np.ndarray, start: int, end: int, place: int, masks: np.ndarray, radius: int, confirm: int
    ) -> Pairs:
        keys = (self._chunk(queries_QW[start:end, 0], place)[:, None] ^ masks[None, :]).ravel()
        first = self.starts[place][keys]
        for probe, found in expand(first, self.starts[place][keys + 1] - first):
            asking, rows = start + probe // len(masks), self.order[place][found]
            near = distance(queries_QW[asking, 0], self.values[rows, 0]) <= radius
            asking, rows = asking[near], rows[near]
            near = sum_of_distances(queries_QW[:, 1:], self.values[:, 1:], asking, rows) <= confirm
            yield asking[near], rows[near]


def scattered(values_N: np.ndarray) -> np.ndarray:
    """The values with their bits in another order, the same for all: each chunk has two bits of every row of an 8×8
    picture. Pictures on white have blank rows; in chunks of whole rows they would all share a bucket."""
    found = np.empty_like(values_N)
    for start in range(0, len(values_N), MANY_VALUES):
        some = np.ascontiguousarray(values_N[start : start + MANY_VALUES])
        bits = np.unpackbits(some.view(np.uint8), bitorder="little").reshape(-1, 64)[:, SCATTER]
        found[start : start + MANY_VALUES] = np.packbits(bits, bitorder="little").view(np.uint64)
    return found


def distance(left_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """Differing bits of 64-bit words, 0 to 64, uint8."""
    return np.bitwise_count(left_N ^ right_N)


def sum_of_distances(left_NW: np.ndarray, right_MW: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Differing bits of the rows `left` and `right` of two tables, over all words; word by word, to hold little."""
    total = np.zeros(len(left), np.int64)
    for word in range(left_NW.shape[1]):
        total += distance(left_NW[left, word], right_MW[right, word])
    return total


def leaders(values_NW: np.ndarray, known: int, radius: int, confirm: int = 0, block: int = 2048) -> np.ndarray:
    """For each of the distinct `values_NW` the row of its leader: the earliest leader that is near, or itself.

    Near is what `HammingIndex.within` says. The first `known` values are leaders already.
    """

    def index(rows: np.ndarray) -> Ask:
        table = HammingIndex(values_NW[rows])
        return lambda asking: table.within(values_NW[asking], radius, confirm)

    return by_leaders.leaders(len(values_NW), known, index, block)
