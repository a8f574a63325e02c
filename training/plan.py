"""The plan: which pairs each step takes, from the tables alone: every rank knows every batch beforehand.

Step s takes pairs [s·B, (s+1)·B) of an endless order, epoch after epoch. An epoch shuffles blocks of
neighbouring rows and mixes the rows of `WINDOW` blocks: one range request per block, and rows from many blocks
in a batch. Its state is {fingerprint, epoch, step}, free of ranks. Every draw is a hash of (seed, epoch, uid).
Cost: tokenising each different text once, then microseconds per pair.
"""

import functools
import hashlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pairs.identity import unit_hash
from pairs.shard import ShardRef
from training.packing import Grid
from training.tokens import Tokens

BLOCK = 64  # neighbouring rows that are read by one range request
WINDOW = 32  # blocks whose rows are mixed
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a shard: `count` pairs of the plan from `first`, `size` bytes of its tar from `start`."""

    shard: ShardRef
    first: int
    count: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All pairs in table order. `texts[i]` are the candidates of pair i, as numbers into `tokens.ids`."""

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

    def __len__(self) -> int:
        return len(self.uids)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row) of each of the step's pairs; a step may end one epoch and begin the next."""
        start = step * self.batch_pairs
        places = (divmod(p, len(self)) for p in range(start, start + self.batch_pairs))
        return [(epoch, int(self.order(epoch)[place])) for epoch, place in places]

    @functools.lru_cache(maxsize=4)  # noqa: B019  a plan lives as long as its process
    def order(self, epoch: int) -> Ints:
        """The epoch's order: a permutation of the rows."""
        blocks = np.argsort(_draws(len(self.blocks), self.seed, epoch, 1), kind="stable")
        draws = _draws(len(self), self.seed, epoch, 2)
        parts = []
        for start in range(0, len(blocks), WINDOW):
            spans = [self.blocks[b] for b in blocks[start : start + WINDOW]]
            rows = np.concatenate([np.arange(s.first, s.first + s.count) for s in spans])
            parts.append(rows[np.argsort(draws[rows], kind="stable")])
        return np.concatenate(parts)

    @functools.cached_property
    def block_of(self) -> Ints:
        """The block of each row."""
        return np.repeat(np.arange(len(self.blocks)), [b.count for b in self.blocks])

    def text(self, epoch: int, row: int) -> int:
        """Which of the pair's texts it brings in this epoch: each with equal chance."""
        choices = self.texts[row]
        if len(choices) == 1:
            return choices[0]
        return choices[int(unit_hash(self.seed, epoch, self.uids[row], "text") * len(choices))]

    @functools.lru_cache(maxsize=65536)  # noqa: B019
    def _grid(self, width: int, height: int) -> Grid:
        return grid_of(width, height, self.max_patches)

    def grid(self, row: int) -> Grid:
        return self._grid(int(self.widths[row]), int(self.heights[row]))

    def split(self, step: int, ranks: int, cost: "Cost") -> list[list[tuple[int, int]]]:
        """The step's pairs by rank, the heaviest first, each to the rank with the least work so far."""
        if ranks == 1:
            return [self.rows(step)]
        works = []
        for place, (epoch, row) in enumerate(self.rows(step)):
            h, w = self.grid(row)
            works.append((-cost(1 + h * w, len(self.tokens.ids[self.text(epoch, row)])), place, (epoch, row)))
        parts: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        loads = [(0.0, rank) for rank in range(ranks)]
        for work, _, pair in sorted(works):
            load, rank = heapq.heappop(loads)
            parts[rank].append(pair)
            heapq.heappush(loads, (load - work, rank))
        return parts

    def digest(self, step: int) -> str:
        """sha256 over the step's uids in order: two runs that agree consumed the same pairs."""
        return hashlib.sha256("\n".join(self.uids[row] for _, row in self.rows(step)).encode()).hexdigest()

    def state(self, step: int) -> dict[str, object]:
        """Where training stands before `step`: rank-free, a few bytes."""
        return {"plan": self.fingerprint, "epoch": step * self.batch_pairs // len(self), "step": step}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pair, up to a factor: linear layers and Σ len² of attention, for both towers."""

    vision: tuple[int, int]  # layers, width
    text: tuple[int, int]

    def __call__(self, image_tokens: int, text_tokens: int) -> float:
        sizes = ((self.vision, image_tokens), (self.text, text_tokens))
        return float(sum(layers * (24 * width * width * n + 4 * width * n * n) for (layers, width), n in sizes))


def steps_of(plan: Plan, uid: str, steps: int) -> Iterator[int]:
    """The steps below `steps` that take the pair `uid`, in order; none where the plan doesn't hold it."""
    if uid in plan.uids:
        row = plan.uids.index(uid)
        for epoch in range(-(-steps * plan.batch_pairs // len(plan))):
            place = epoch * len(plan) + int(np.flatnonzero(plan.order(epoch) == row)[0])
            if place // plan.batch_pairs < steps:
                yield place // plan.batch_pairs


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


def _draws(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """`count` 64-bit draws that depend on the key alone (splitmix64), equal on any machine and numpy."""
    start = int(unit_hash(*key) * 2**53)
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start << 11)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
