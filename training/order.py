"""The endless order of pairs: epoch after epoch, each shuffled, each source as often as its weight says.

An epoch shuffles blocks of neighbouring rows and mixes the rows of `WINDOW` blocks: one range request per block, and
rows from many blocks side by side. A source of weight w brings each of its pairs w times an epoch: fractions add up
over epochs, so that counts are exact, and where an epoch begins is arithmetic. Cost: a sort of the epoch.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pairs.identity import unit_hash

WINDOW = 32  # blocks whose rows are mixed
Ints = npt.NDArray[np.int64]
Draws = npt.NDArray[np.uint64]


class Order:
    """`keys` are the rows' uids as numbers, `block_of` their blocks, `sources` the blocks' sources."""

    def __init__(
        self, keys: Draws, block_of: Ints, sources: list[str], seed: int, weights: Mapping[str, float]
    ) -> None:
        self.keys, self.block_of, self.blocks, self.seed = keys, block_of, len(sources), seed
        self.shares = self._shares(sources, weights)

    def start(self, epoch: int) -> int:
        """The place where the epoch begins: of n pairs of weight w, ⌊e·n·w + 1/2⌋ come before it (see `met`)."""
        return sum(
            (2 * len(rows) * w.numerator * epoch + w.denominator) // (2 * w.denominator) for rows, w in self.shares
        )

    def epoch_at(self, place: int) -> int:
        """The epoch that holds a place of the endless order."""
        epoch = int(place / sum(len(rows) * w for rows, w in self.shares))
        while self.start(epoch) > place:
            epoch -= 1
        while self.start(epoch + 1) <= place:
            epoch += 1
        return epoch

    def entries(self, place: int, end: int) -> tuple[Ints, Ints]:
        """Rows of the places [place, end), and how often each was met before: where all weights are 1, the epoch."""
        parts, epoch = [], self.epoch_at(place)
        while place < end:
            first = self.start(epoch)
            parts.append(self.of(epoch)[:, place - first : end - first])
            place, epoch = place + parts[-1].shape[1], epoch + 1
        met, rows = np.concatenate(parts, axis=1)
        return met, rows

    @functools.lru_cache(maxsize=4)  # noqa: B019  an order lives as long as its process
    def of(self, epoch: int) -> Ints:
        """(2, places) of an epoch: how often the row was met before, and the row, which comes as often as its source's
        weight says: by default, once."""
        before = self.met(epoch)
        times = self.met(epoch + 1) - before
        rounds = [np.flatnonzero(times > copy) for copy in range(max(1, times.max()))]
        rows, copies = np.concatenate(rounds), np.repeat(np.arange(len(rounds)), [len(part) for part in rounds])
        blocks, which = np.unique(self.block_of[rows] + copies * self.blocks, return_inverse=True)
        place = np.empty(len(blocks), np.int64)
        place[np.argsort(draws(blocks.astype(np.uint64), self.seed, epoch, 1), kind="stable")] = np.arange(len(blocks))
        mixed = draws(self.keys[rows] + copies.astype(np.uint64), self.seed, epoch, 2)
        order = np.lexsort((mixed, place[which] // WINDOW))
        return np.stack([before[rows] + copies, rows])[:, order]

    def met(self, epoch: int) -> Ints:
        """How often each row is met before the epoch: the k-th of n pairs ⌊e·w + (k + 1/2) / n⌋ times, never more than
        once off e·w, and in sum ⌊e·n·w + 1/2⌋ (Hermite's identity). With weight 0.5, halves take turns."""
        times = np.zeros(len(self.keys), np.int64)
        for rows, weight in self.shares:
            n, b = len(rows), weight.denominator
            whole, rest = divmod(epoch * weight.numerator, b)
            times[rows] = whole + (2 * n * rest + b * (2 * np.arange(n) + 1)) // (2 * n * b)
        return times

    def _shares(self, sources: list[str], weights: Mapping[str, float]) -> list[tuple[Ints, Fraction]]:
        """Rows and weight of each source, block by block in a shuffled order: a small weight takes whole blocks."""
        place = draws(np.arange(self.blocks, dtype=np.uint64), self.seed, 0)
        names = np.array([source if source in weights else "" for source in sources])
        shares = []
        for name in np.unique(names):
            rows = np.flatnonzero((names == name)[self.block_of])
            weight = Fraction(str(weights.get(str(name), 1.0))).limit_denominator(1000)
            shares.append((rows[np.lexsort((rows, place[self.block_of[rows]]))], weight))
        return shares


def draws(keys: Draws, *key: object) -> Draws:
    """A 64-bit draw for each of `keys` that depends on it and on `key` alone (splitmix64), equal on any machine."""
    start = int(unit_hash(*key) * 2**53)
    with np.errstate(over="ignore"):
        x = keys * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start << 11)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
