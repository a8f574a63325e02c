"""The plan: which pairs each step takes, from the tables alone: every rank knows every batch beforehand.

The pairs of the endless order (`order`) are dealt, some `DEALT` at a time, to the steps, so that all have nearly equal
patches and text tokens (decision 11). The state is {fingerprint, epoch, step}, free of ranks. Every draw is a hash of
(seed, epoch, uid); where sources have weights, how often the pair was met before stands for the epoch. Cost: tokenising
each different text once, then microseconds per pair.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pairs.shard import ShardRef
from training.dealing import deal
from training.order import Draws, Ints, Order, draws
from training.pixels import kept
from training.tokens import Tokens

if TYPE_CHECKING:
    from training.packing import Grid

BLOCK = 64  # neighbouring rows that are read by one range request
DEALT, FEWEST = 8192, 4  # pairs that are dealt together, and the fewest steps
SURVEYED = 1024  # times so many steps tell how large a step's streams become


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a shard: `count` pairs of the plan from `first`, `size` bytes of its tar from `start`."""

    shard: ShardRef
    first: int
    count: int
    start: int
    size: int
    tar_sha256: str = ""

    @property
    def source(self) -> str:
        """Shards lie in `…/<source>-<fingerprint>/<increment>`."""
        return self.shard.folder.split("/")[-2].rpartition("-")[0]


@dataclass(frozen=True, eq=False)
class Plan:
    """All pairs in table order. `texts[i]` are the candidates of pair i, as numbers into `tokens.ids`. `weights` are
    those of sources, as far as they aren't 1."""

    uids: list[str]
    texts: list[list[int]]
    offsets: Ints  # of the image within its shard's tar
    sizes: Ints
    widths: Ints
    heights: Ints
    blocks: list[Block]
    tokens: Tokens
    batch_pairs: int
    max_patches: int
    seed: int
    fingerprint: str
    dropout: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    square: bool = False  # images are squashed to the square of `max_patches`, as BLIP's are

    def __len__(self) -> int:
        return len(self.uids)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row) of each of the step's pairs; a step may end one epoch and begin the next."""
        first, end = self.window_of(step)
        epochs, rows = self.window(first, end)
        return list(zip(epochs[step - first].tolist(), rows[step - first].tolist(), strict=True))

    def window_of(self, step: int) -> tuple[int, int]:
        """The steps [first, end) whose pairs are dealt together with this one's. Windows share out the steps that begin
        in an epoch, so that with the last of them every pair of it has been met."""
        pairs = self.batch_pairs
        epoch = self.order.epoch_at(step * pairs)
        begin, after = (-(-self.order.start(e) // pairs) for e in (epoch, epoch + 1))
        steps = after - begin
        count = max(1, round(steps / max(FEWEST, DEALT // pairs)))
        number = ((step - begin + 1) * count - 1) // steps
        return begin + steps * number // count, begin + steps * (number + 1) // count

    @functools.lru_cache(maxsize=4)  # noqa: B019  a plan lives as long as its process
    def window(self, first: int, end: int) -> tuple[Ints, Ints]:
        """Epochs and rows, each (steps, batch_pairs), of the steps of a window."""
        epochs, rows = self._entries(first, end)
        dealt = deal(self._tokens_of(epochs, rows), end - first)
        return epochs[dealt], rows[dealt]

    def _entries(self, first: int, end: int) -> tuple[Ints, Ints]:
        """Epochs and rows of the window's places in the endless order."""
        return self.order.entries(first * self.batch_pairs, end * self.batch_pairs)

    def tokens_of(self, pairs: Sequence[tuple[int, int]]) -> Ints:
        """(pairs, 2): patches that are looked at, and text tokens, of pairs of epoch and row."""
        epochs, rows = np.array(pairs).T
        return self._tokens_of(epochs, rows)

    def _tokens_of(self, epochs: Ints, rows: Ints) -> Ints:
        texts = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            texts[epochs == epoch] = self._lengths[self._texts(int(epoch))[rows[epochs == epoch]]]
        return np.stack([self._patches[rows], texts], axis=1)

    @functools.cached_property
    def order(self) -> Order:
        """Epoch after epoch of the rows."""
        return Order(self._keys, self.block_of, [block.source for block in self.blocks], self.seed, self.weights)

    @functools.cached_property
    def block_of(self) -> Ints:
        """The block of each row."""
        return np.repeat(np.arange(len(self.blocks)), [b.count for b in self.blocks])

    @functools.cached_property
    def _keys(self) -> Draws:
        return np.array([int(uid[:16], 16) for uid in self.uids], np.uint64)

    @functools.cached_property
    def _lengths(self) -> Ints:
        """Tokens of each text."""
        return np.array([len(ids) for ids in self.tokens.ids])

    @functools.cached_property
    def _patches(self) -> Ints:
        """Patches of each row that are looked at."""
        different, which = np.unique(np.stack([self.widths, self.heights]), axis=1, return_inverse=True)
        found = [kept(math.prod(self._grid(int(w), int(h))), self.dropout) for w, h in different.T]
        return np.array(found)[which.ravel()]

    @functools.cached_property
    def _choices(self) -> tuple[Ints, Ints, Ints]:
        """All pairs' texts one after another, where each pair's begin, and how many they are."""
        counts = np.array([len(texts) for texts in self.texts])
        return np.array([n for texts in self.texts for n in texts]), np.cumsum(counts) - counts, counts

    @functools.lru_cache(maxsize=32)  # noqa: B019  a source's weight gives it numbers of its own
    def _texts(self, epoch: int) -> Ints:
        """The text that each row brings in the epoch: each of its texts with equal chance."""
        texts, first, counts = self._choices
        chance = (draws(self._keys, self.seed, epoch, "text") >> np.uint64(11)) / 2.0**53
        return texts[first + (chance * counts).astype(np.int64)]

    def text(self, epoch: int, row: int) -> int:
        """Which of the pair's texts it brings in this epoch."""
        return int(self._texts(epoch)[row])

    @functools.lru_cache(maxsize=65536)  # noqa: B019
    def _grid(self, width: int, height: int) -> Grid:
        return grid_of(*((1, 1) if self.square else (width, height)), self.max_patches)

    def grid(self, row: int) -> Grid:
        return self._grid(int(self.widths[row]), int(self.heights[row]))

    def split(self, step: int, shares: int, cost: Cost) -> list[list[tuple[int, int]]]:
        """The step's pairs in `shares` of nearly equal patches, text tokens and work, and of equal counts but for one.
        Work is told in tokens of a mean pair, so that all three weigh alike."""
        pairs = self.rows(step)
        tokens = self.tokens_of(pairs)
        work = cost(1 + tokens[:, 0], tokens[:, 1])
        scaled = np.rint(work * (tokens.sum() / work.sum())).astype(np.int64)
        return [[pairs[i] for i in share if i >= 0] for share in deal(np.column_stack([tokens, scaled]), shares)]

    def largest(self, steps: int, shares: int) -> tuple[int, int]:
        """Patches and text tokens that one of `shares` of a step holds at most, were each step's pairs dealt without a
        rest; over the steps of a run, the first windows of a long one."""
        most, step = np.zeros(2, np.int64), 0
        for _ in range(SURVEYED):
            first, end = self.window_of(step)
            most = np.maximum(most, -(-self._tokens_of(*self._entries(first, end)).sum(0) // ((end - first) * shares)))
            step = end
            if step >= steps:
                break
        patches, texts = most
        return int(patches), int(texts)

    def digest(self, step: int) -> str:
        """sha256 over the step's uids in order: two runs that agree consumed the same pairs."""
        return hashlib.sha256("\n".join(self.uids[row] for _, row in self.rows(step)).encode()).hexdigest()

    def state(self, step: int) -> dict[str, object]:
        """Where training stands before `step`: rank-free, a few bytes."""
        return {"plan": self.fingerprint, "epoch": self.order.epoch_at(step * self.batch_pairs), "step": step}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pair, up to a factor: linear layers and Σ len² of attention, for both towers."""

    vision: tuple[int, int]  # layers, width
    text: tuple[int, int]

    def __call__(self, image_tokens: Ints, text_tokens: Ints) -> npt.NDArray[np.float64]:
        sizes = ((self.vision, image_tokens), (self.text, text_tokens))
        found = sum(layers * (24.0 * width * width * n + 4.0 * width * n * n) for (layers, width), n in sizes)
        return np.asarray(found, np.float64)


def taken(plan: Plan, uids: Collection[str], steps: int) -> Iterator[tuple[int, str]]:
    """(step, uid) each time that the steps below `steps` take one of `uids`, in order of steps."""
    rows = np.array([row for row, uid in enumerate(plan.uids) if uid in uids], np.int64)
    windows, epoch = set[tuple[int, int]](), 0
    end = plan.window_of(steps - 1)[1] * plan.batch_pairs
    while len(rows) and plan.order.start(epoch) < end:
        places = np.flatnonzero(np.isin(plan.order.of(epoch)[1], rows)) + plan.order.start(epoch)
        windows.update(plan.window_of(int(place) // plan.batch_pairs) for place in places)
        epoch += 1
    for first, end in sorted(windows):
        found = plan.window(first, end)[1]
        for place, pair in zip(*np.nonzero(np.isin(found, rows)), strict=True):
            if first + place < steps:
                yield int(first + place), plan.uids[found[place, pair]]


def grid_of(width: int, height: int, max_patches: int) -> Grid:
    """The (rows, columns) within `max_patches` cells that keep the image's aspect and waste least of the budget.

    For 200 x 100 px and 64 patches that is (5, 10): 50 cells undistorted, where (5, 11) would stretch by 10 %.
    """
    ideal = math.sqrt(max_patches * height / width)
    best, best_score = (1, 1), -math.inf
    for h in range(max(1, math.floor(ideal) - 1), min(max_patches, math.ceil(ideal) + 1) + 1):
        for w in {max(1, math.floor(h * width / height)), max(1, math.ceil(h * width / height)), max_patches // h}:
            if 1 <= w <= max_patches // h:
                # Both are logarithms: 10 % of aspect weighs as much as 10 % of the area, twice over.
                score = math.log(h * w) - 2 * abs(math.log(w * height / (h * width)))
                if score > best_score:
                    best, best_score = (h, w), score
    return best
