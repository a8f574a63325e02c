"""Shape and content of the image: sides, aspect, bytes, and how much there is to see.

Sides and bytes are those of the image as it was found, before fetch resized it; the rest looks at the stored pixels in
grey or colour. A placeholder has low entropy, a blurred picture low sharpness, a frame of a film borders. About 0.3 ms
for 256×256 pixels. Sharpness is the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), colourfulness that of
Hasler and Süsstrunk (SPIE 2003).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.base import PIXELS, Batch, Filter

MEASURED = ("entropy", "sharpness", "blankness", "borders", "colourfulness")
ENOUGH = 1 << 14
OPPONENTS = np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32)
SAME = 16  # levels that a border may spread over: JPEG leaves some beside the picture


@dataclass(frozen=True)
class ImageStats(Filter):
    """`*_px` sides as found, `aspect` longer over shorter (≥ 1), `size_bytes` as found; `entropy` of the grey histogram
    in bits, [0, 8]; `sharpness` variance of the Laplacian, ≥ 0; `blankness` share of the commonest grey, (0, 1];
    `borders` share of the area in rows and columns of one colour along the edges, [0, 1]; `colourfulness` 0 for grey,
    about 110 for the most vivid photographs. With `looks: false` no image is decoded for it, and only sides, `aspect`
    and `size_bytes` are there."""

    looks: bool = True

    version = 2

    @property
    def needs(self) -> tuple[str, ...]:
        return (*((PIXELS,) if self.looks else ()), "original_width", "original_height", "original_bytes")

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        sides = dict.fromkeys(("width_px", "height_px", "shorter_side_px"), pa.int32())
        shape = sides | {"aspect": pa.float32(), "size_bytes": pa.int64()}
        return shape | (dict.fromkeys(MEASURED, pa.float32()) if self.looks else {})

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        widths, heights = batch["original_width"], batch["original_height"]
        sides = [sorted((w, h)) if w and h else None for w, h in zip(widths, heights, strict=True)]
        looks = [(None,) * len(MEASURED) if image is None else look(image) for image in batch.pixels]
        shape = {
            "width_px": widths,
            "height_px": heights,
            "shorter_side_px": [s[0] if s else None for s in sides],
            "aspect": [s[1] / s[0] if s else None for s in sides],
            "size_bytes": batch["original_bytes"],
        }
        return shape | {name: [values[i] for values in looks] for i, name in enumerate(MEASURED) if self.looks}


def look(image: np.ndarray) -> tuple[float, ...]:
    """What `MEASURED` names, of an HxWx3 uint8 RGB image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    share = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().astype(float) / grey.size
    seen = share[share > 0]
    entropy = max(0.0, float(-(seen * np.log2(seen)).sum()))
    sharpness = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1].item() ** 2
    return entropy, sharpness, float(share.max()), borders(image), colourfulness(image)


def borders(image: np.ndarray) -> float:
    """0.25 for a film of 192 rows between two black bars of 32; 1.0 for an image of one colour."""
    height, width = image.shape[:2]
    top, bottom = _edge(image, 1, 0), _edge(image, 1, -1)
    if top == height:
        return 1.0
    middle = image[top : height - bottom]
    left, right = _edge(middle, 0, 0), _edge(middle, 0, -1)
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


def _edge(image: np.ndarray, along: int, end: int) -> int:
    """How many rows (`along` 1) or columns (0), from the first (`end` 0) or the last (-1) one, have the colour of that
    one, if it is of one colour. Most images end at this test."""
    line = image[end] if along else image[:, end]
    darkest, brightest = (extreme(axis=0).astype(int) for extreme in (line.min, line.max))
    if (brightest - darkest > SAME).any():
        return 0
    inside = cv2.inRange(image, (brightest - SAME).astype(float), (darkest + SAME).astype(float))
    like = cv2.reduce(inside, along, cv2.REDUCE_MIN).ravel()[:: 1 + 2 * end] > 0
    return len(like) if like.all() else int(like.argmin())


def colourfulness(image: np.ndarray) -> float:
    """Spread and mean of the two opponent colours, red against green and yellow against blue, in so many evenly spread
    pixels of a large image that there are about 16,000."""
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // ENOUGH))
    some = image[::step, ::step].astype(np.float32)
    mean, spread = cv2.meanStdDev(cv2.transform(some, OPPONENTS))
    return float(np.hypot(*spread).item() + 0.3 * np.hypot(*mean).item())
