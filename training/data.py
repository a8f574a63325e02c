"""From the plan to packed batches: one range request per block, decoding ahead of the step in threads.

Everything about a batch's shape comes from the plan, so a damaged image changes none: its patches
are zeros, its pair is masked and counted. A block that can't be read ends the run. Decoding releases the
interpreter's lock. JPEGs far larger than
their patches are decoded at a half, a quarter or an eighth. Cost: the blocks of two windows in memory.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pairs.errors import PairmillError
from pairs.identity import unit_hash
from pairs.store import Store
from training.packing import CLIP, Form, Grid, PackedImages, PackedTexts, pack_images, pack_texts
from training.plan import WINDOW, Block, Cost, Plan

REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
JPEG = b"\xff\xd8"
READS, PAUSE_S = 4, 0.5  # tries of a block, and the first pause between them, which doubles
DRAWS = ("turn", "stretch", "zoom", "x", "y")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step, in one or more `parts` that follow one another. `same` holds row and text of all
    ranks' pairs, in order of rank."""

    parts: tuple[tuple[PackedImages, PackedTexts], ...]
    valid: torch.Tensor  # bool (own pairs,)
    same: torch.Tensor  # int64 (all pairs, 2): pairs that share either are not negatives
    counts: tuple[int, ...]  # pairs by rank
    damaged: dict[str, int]  # own pairs that couldn't be decoded, by reason
    flops: float = 0.0  # useful ones of forward and backward

    def to(self, device: torch.device) -> "Batch":
        parts = tuple((images.to(device), texts.to(device)) for images, texts in self.parts)
        return Batch(parts, self.valid.to(device), self.same.to(device), self.counts, self.damaged, self.flops)

    @property
    def useful(self) -> int:
        """Tokens that belong to examples."""
        return sum(images.useful + texts.useful for images, texts in self.parts)

    @property
    def computed(self) -> int:
        return sum(len(images.place) + len(texts.tokens) for images, texts in self.parts)


class Loader:
    """Batches of one rank, step after step; `wait_s` is how long the last one was waited for."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        rank: int,
        ranks: int,
        cost: Cost,
        patch_px: int,
        jitter: float,
        form: Form = CLIP,
        dropout: float = 0.0,
        accumulate: int = 1,
        multiple: int = 1,
    ) -> None:
        self.plan, self.store, self.rank, self.ranks, self.cost = plan, store, rank, ranks, cost
        self.patch_px, self.jitter, self.form, self.dropout = patch_px, jitter, form, dropout
        self.accumulate, self.multiple = accumulate, multiple
        self.wait_s = 0.0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def batches(self, start: int, end: int, ahead: int = 3, threads: int = 1) -> Iterator[Batch]:
        """The batches of steps [start, end), `ahead` of them in the making."""
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            pending: list[Future[Batch]] = [pool.submit(self.load, s) for s in range(start, min(end, start + ahead))]
            for step in range(start, end):
                began = time.perf_counter()
                batch = pending.pop(0).result()
                self.wait_s = time.perf_counter() - began
                if step + ahead < end:
                    pending.append(pool.submit(self.load, step + ahead))
                yield batch

    def load(self, step: int) -> Batch:
        """This rank's batch of `step`, packed; heavy and light pairs are spread over its parts."""
        split = self.plan.split(step, self.ranks, self.cost)
        portions = [
            [own[i :: self.accumulate] for i in range(self.accumulate) if own[i :: self.accumulate]] for own in split
        ]
        own = portions[self.rank]
        reasons: Counter[str] = Counter()
        valid: list[bool] = []
        parts = tuple(self._part(pairs, reasons, valid) for pairs in own)
        return Batch(
            parts=parts,
            valid=torch.tensor(valid),
            same=torch.tensor([[r, self.plan.text(e, r)] for rank in portions for part in rank for e, r in part]),
            counts=tuple(map(len, split)),
            damaged=dict(reasons),
            flops=3 * sum(self._cost(epoch, row) for pairs in own for epoch, row in pairs),
        )

    def _cost(self, epoch: int, row: int) -> float:
        """FLOPs of a pair's forward pass."""
        h, w = self.plan.grid(row)
        patches = max(1, round(h * w * (1 - self.dropout)))
        return self.cost(int(self.form.class_token) + patches, len(self.plan.tokens.ids[self.plan.text(epoch, row)]))

    def _part(
        self, pairs: list[tuple[int, int]], reasons: Counter[str], valid: list[bool]
    ) -> tuple[PackedImages, PackedTexts]:
        """The pairs (epoch, row), packed; adds to `valid` whether each has an image, and to `reasons` why not."""
        patches, cells = [], []
        for epoch, row in pairs:
            grid = self.plan.grid(row)
            pixels, reason = self._pixels(epoch, row, grid)
            valid.append(reason is None)
            if reason:
                reasons[reason] += 1
            cells.append(torch.from_numpy(self._cells(epoch, row, grid)))
            patches.append(torch.from_numpy(patchify(pixels, grid, self.patch_px))[cells[-1]])
        texts = [torch.from_numpy(self.plan.tokens.ids[self.plan.text(e, r)]) for e, r in pairs]
        grids = [self.plan.grid(r) for _, r in pairs]
        images = pack_images(patches, grids, self.form, cells, self.multiple)
        return images, pack_texts(texts, self.form, self.multiple)

    def _cells(self, epoch: int, row: int, grid: Grid) -> npt.NDArray[np.int64]:
        """The cells of an image that this epoch looks at: all, or without those that patch dropout takes (FLIP, arXiv
        2212.00794), drawn by the pair's uid."""
        count = grid[0] * grid[1]
        kept = max(1, round(count * (1 - self.dropout)))
        if kept == count:
            return np.arange(count)
        draws = np.random.default_rng(int(unit_hash(self.plan.seed, epoch, self.plan.uids[row], "cells") * 2**53))
        return np.sort(draws.permutation(count)[:kept])

    def _pixels(self, epoch: int, row: int, grid: Grid) -> tuple[Pixels, str | None]:
        """The jittered and resized picture (h·P, w·P, 3), RGB; zeros and the reason where it can't be read."""
        size = (int(self.plan.widths[row]), int(self.plan.heights[row]))
        picture = decode(self._bytes(row), size, grid, self.patch_px)
        if picture is None:
            return np.zeros((grid[0] * self.patch_px, grid[1] * self.patch_px, 3), np.uint8), "undecodable"
        if self.jitter:
            draws = [unit_hash(self.plan.seed, epoch, self.plan.uids[row], what) for what in DRAWS]
            picture = jittered(picture, self.jitter, draws)
        return resize(picture, grid, self.patch_px), None

    def _bytes(self, row: int) -> bytes:
        number = int(self.plan.block_of[row])
        block = self.plan.blocks[number]
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = _read(self.store, block)
                if len(self._blocks) > 2 * WINDOW:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(number)
            data = self._blocks[number]
        start = int(self.plan.offsets[row]) - block.start
        return data[start : start + int(self.plan.sizes[row])]


def _read(store: Store, block: Block) -> bytes:
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


def decode(data: bytes, size: tuple[int, int] | None = None, grid: Grid = (1, 1), patch_px: int = 1) -> Pixels | None:
    """The picture (height, width, 3), RGB. Where `size` (width, height) is given, it may be reduced to no less than
    `grid` holds. None where it can't be decoded or isn't of `size`."""
    flag, shrink = cv2.IMREAD_COLOR, 1
    if size and data[:2] == JPEG:  # other decoders make the whole picture first
        spare = min(size[0] / (grid[1] * patch_px), size[1] / (grid[0] * patch_px))
        shrink = next((factor for factor in REDUCED if spare >= factor), 1)
        flag = REDUCED.get(shrink, cv2.IMREAD_COLOR)
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # no bytes at all, or more pixels than OpenCV is allowed
        return None
    if picture is None or (size and picture.shape[:2] != (-(-size[1] // shrink), -(-size[0] // shrink))):
        return None
    return np.asarray(picture[:, :, ::-1], dtype=np.uint8)


def resize(picture: Pixels, grid: Grid, patch_px: int) -> Pixels:
    """The picture at (h·P, w·P): averaged where it shrinks, cubic where it grows."""
    width, height = grid[1] * patch_px, grid[0] * patch_px
    shrinks = picture.shape[1] >= width and picture.shape[0] >= height
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=how), dtype=np.uint8)


def patchify(pixels: Pixels, grid: Grid, patch_px: int) -> Pixels:
    """(h·P, w·P, 3) to (h·w, 3·P·P) in the order of a convolution's weights: channel, row, column."""
    h, w = grid
    cells = pixels.reshape(h, patch_px, w, patch_px, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cells).reshape(h * w, -1)


def jittered(picture: Pixels, amount: float, draws: Sequence[float]) -> Pixels:
    """The picture turned, stretched, zoomed and shifted a little, its edges drawn out; never mirrored or tinted.

    `amount` 0.1 allows 6 degrees, and 10 % of stretch, zoom and shift each; `draws` are in [0, 1), one of `DRAWS` each.
    """
    height, width = picture.shape[:2]
    turn, stretch, zoom, x, y = (amount * (2 * draw - 1) for draw in draws)
    sizes = np.diag([np.exp(zoom + stretch / 2), np.exp(zoom - stretch / 2)])
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ sizes
    middle = np.array([width, height]) / 2
    shift = middle - turned @ middle + (x * width, y * height)
    matrix = np.column_stack([turned, shift])
    moved = cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, dtype=np.uint8)
