"""From encoded images to rows of patches, written straight into the stream that a step reads.

Light to import (no torch): decoder processes start with it. A picture stays in the decoder's channel order and is
turned with its patches; JPEGs far larger than their patches are decoded at a half, a quarter or an eighth. Every draw
is a hash of (seed, epoch, uid): bytes are the same whoever computes them. Patch dropout: FLIP, arXiv 2212.00794.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pairs.identity import unit_hash

if TYPE_CHECKING:
    from training.packing import Cells, Grid

REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
JPEG = b"\xff\xd8"
DRAWS = ("turn", "stretch", "zoom", "x", "y")
Pixels = npt.NDArray[np.uint8]


class Look(NamedTuple):
    """How a run looks at its images."""

    seed: int
    patch_px: int
    jitter: float
    dropout: float


class Item(NamedTuple):
    """An encoded image, what the tables say of it, and the row of the stream that its first patch goes to."""

    data: bytes
    size: tuple[int, int]  # width, height
    grid: Grid
    epoch: int
    uid: str
    start: int

    def looked_at(self, look: Look) -> int:
        """Rows that its patches take."""
        return kept(self.grid[0] * self.grid[1], look.dropout)


def fill(rows: Pixels, item: Item, look: Look) -> bool:
    """Writes the patches of the cells that are looked at into `rows` (T, 3·P·P); False, and nothing, where the image
    can't be decoded."""
    picture = _decoded(item.data, item.size, item.grid, look.patch_px)
    if picture is None:
        return False
    if look.jitter:
        draws = [unit_hash(look.seed, item.epoch, item.uid, what) for what in DRAWS]
        picture = jittered(picture, look.jitter, draws)
    patches = _cut(resize(picture, item.grid, look.patch_px), item.grid, look.patch_px)[..., ::-1, :, :]
    cells = cells_of(item.grid, item.epoch, item.uid, look)
    there = rows[item.start : item.start + len(cells)].reshape(len(cells), 3, look.patch_px, look.patch_px)
    if len(cells) < item.grid[0] * item.grid[1]:
        there[:] = patches.reshape(-1, *there.shape[1:])[cells]
    else:
        there.reshape(patches.shape)[:] = patches
    return True


def kept(cells: int, dropout: float) -> int:
    """How many of an image's cells are looked at."""
    return max(1, round(cells * (1 - dropout)))


def cells_of(grid: Grid, epoch: int, uid: str, look: Look) -> Cells:
    """The cells of an image that this epoch looks at: all, or without those that patch dropout takes."""
    cells = grid[0] * grid[1]
    count = kept(cells, look.dropout)
    if count == cells:
        return np.arange(cells)
    draws = np.random.default_rng(int(unit_hash(look.seed, epoch, uid, "cells") * 2**53))
    return np.sort(draws.permutation(cells)[:count])


def decode(data: bytes, size: tuple[int, int] | None = None, grid: Grid = (1, 1), patch_px: int = 1) -> Pixels | None:
    """The picture (height, width, 3), RGB. Where `size` (width, height) is given, it may be reduced to no less than
    `grid` holds. None where it can't be decoded or isn't of `size`."""
    picture = _decoded(data, size, grid, patch_px)
    return None if picture is None else picture[:, :, ::-1]


def _decoded(data: bytes, size: tuple[int, int] | None, grid: Grid, patch_px: int) -> Pixels | None:
    """As `decode`, but blue first."""
    flag, shrink = cv2.IMREAD_COLOR, 1
    if size and data[:2] == JPEG:  # other decoders make the whole picture first
        spare = min(size[0] / (grid[1] * patch_px), size[1] / (grid[0] * patch_px))
        shrink = next((factor for factor in REDUCED if spare >= factor), 1)
        flag = REDUCED.get(shrink, cv2.IMREAD_COLOR)
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except (cv2.error, MemoryError):  # no bytes at all, more pixels than OpenCV is allowed, or than memory holds
        return None
    if picture is None or (size and picture.shape[:2] != (-(-size[1] // shrink), -(-size[0] // shrink))):
        return None
    return np.asarray(picture, dtype=np.uint8)


def resize(picture: Pixels, grid: Grid, patch_px: int) -> Pixels:
    """The picture at (h·P, w·P): averaged where it shrinks, cubic where it grows."""
    width, height = grid[1] * patch_px, grid[0] * patch_px
    shrinks = picture.shape[1] >= width and picture.shape[0] >= height
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=how), dtype=np.uint8)


def patchify(pixels: Pixels, grid: Grid, patch_px: int) -> Pixels:
    """(h·P, w·P, 3) to (h·w, 3·P·P) in the order of a convolution's weights: channel, row, column."""
    return np.ascontiguousarray(_cut(pixels, grid, patch_px)).reshape(grid[0] * grid[1], -1)


def _cut(pixels: Pixels, grid: Grid, patch_px: int) -> Pixels:
    """(h·P, w·P, 3) seen as (h, w, 3, P, P)."""
    return pixels.reshape(grid[0], patch_px, grid[1], patch_px, 3).transpose(0, 2, 4, 1, 3)


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
