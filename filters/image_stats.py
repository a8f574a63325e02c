"""Shape and content of the image: sides, aspect, bytes, and how much there is to see.

Sides and bytes are those of the image as it was found, before fetch resized it; the rest looks at the stored pixels in
grey or colour. A placeholder has low entropy, a blurred picture low sharpness, a frame of a film borders. About 0.7 ms
for 256×256 pixels. Sharpness is the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), colourfulness that of
Hasler and Süsstrunk (SPIE 2003).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.base import Batch, Filter

MEASURED = ("entropy", "sharpness", "blankness", "borders", "colourfulness")
SAME = 16  # levels that a border may spread over: JPEG leaves some beside the picture


@dataclass(frozen=True)
class ImageStats(Filter):
    """`*_px` sides as found, `aspect` longer over shorter (≥ 1), `size_bytes` as found; `entropy` of the grey histogram
    in bits, [0, 8]; `sharpness` variance of the Laplacian, ≥ 0; `blankness` share of the commonest grey, (0, 1];
    `borders` share of the area in rows and columns of one colour along the edges, [0, 1]; `colourfulness` 0 for grey,
    about 110 for the most vivid photographs."""

    version = 2
    needs = ("pixels", "original_width", "original_height", "original_bytes")
    columns = {
        "width_px": pa.int32(),
        "height_px": pa.int32(),
        "shorter_side_px": pa.int32(),
        "aspect": pa.float32(),
        "size_bytes": pa.int64(),
        "entropy": pa.float32(),
        "sharpness": pa.float32(),
        "blankness": pa.float32(),
        "borders": pa.float32(),
        "colourfulness": pa.float32(),
    }

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        widths, heights = batch["original_width"], batch["original_height"]
        sides = [sorted((w, h)) if w and h else None for w, h in zip(widths, heights, strict=True)]
        looks = [(None,) * len(MEASURED) if image is None else look(image) for image in batch.pixels]
        return {
            "width_px": widths,
            "height_px": heights,
            "shorter_side_px": [s[0] if s else None for s in sides],
            "aspect": [s[1] / s[0] if s else None for s in sides],
            "size_bytes": batch["original_bytes"],
        } | {name: [values[i] for values in looks] for i, name in enumerate(MEASURED)}


def look(image: np.ndarray) -> tuple[float, ...]:
    """What `MEASURED` names, of an HxWx3 uint8 RGB image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    seen = share[share > 0]
    entropy = max(0.0, float(-(seen * np.log2(seen)).sum()))
    sharpness = float(cv2.Laplacian(grey, cv2.CV_64F).var())
    return entropy, sharpness, float(share.max()), borders(image), colourfulness(image)


def borders(image: np.ndarray) -> float:
    """0.25 for a film of 192 rows between two black bars of 32; 1.0 for an image of one colour."""
    height, width = image.shape[:2]
    top, bottom = _edges(image, 1)
    left, right = _edges(image[top : height - bottom], 0) if top + bottom < height else (width, 0)
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


def _edges(image: np.ndarray, along: int) -> tuple[int, int]:
    """How many rows (`along` 1) or columns (0) from either end have the colour of the outermost one, which is one
    colour; all count for the first end where the whole image has."""
    low, high = (cv2.reduce(image, along, way).reshape(-1, 3).astype(int) for way in (cv2.REDUCE_MIN, cv2.REDUCE_MAX))
    first = _run(low, high)
    return (first, 0) if first == len(low) else (first, _run(low[::-1], high[::-1]))


def _run(low: np.ndarray, high: np.ndarray) -> int:
    like = ((high - low[0] <= SAME) & (high[0] - low <= SAME)).all(axis=1)
    return len(like) if like.all() else int(like.argmin())


def colourfulness(image: np.ndarray) -> float:
    """Spread and mean of the two opponent colours, red against green and yellow against blue."""
    red, green, blue = cv2.split(image.astype(np.float32))
    (a, a_std), (b, b_std) = (cv2.meanStdDev(plane) for plane in (red - green, (red + green) / 2 - blue))
    return float(np.hypot(a_std, b_std).item() + 0.3 * np.hypot(a, b).item())
