"""Shape and content of the image: sides, aspect, bytes, and how much there is to see.

Sides and bytes are those of the image as it was found, before fetch resized it; the rest looks at the stored pixels in
grey. A placeholder has low entropy, a blurred picture low sharpness. About 0.3 ms for 256×256 pixels.
Sharpness is the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.base import Batch, Filter

MEASURED = ("entropy", "sharpness", "blankness")


@dataclass(frozen=True)
class ImageStats(Filter):
    """`*_px` sides as found, `aspect` longer over shorter (≥ 1), `size_bytes` as found; `entropy` of the grey histogram
    in bits, [0, 8]; `sharpness` variance of the Laplacian, ≥ 0; `blankness` share of the commonest grey, (0, 1]."""

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


def look(image: np.ndarray) -> tuple[float, float, float]:
    """Entropy, sharpness and blankness of an HxWx3 uint8 RGB image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    seen = share[share > 0]
    entropy = max(0.0, float(-(seen * np.log2(seen)).sum()))
    return entropy, float(cv2.Laplacian(grey, cv2.CV_64F).var()), float(share.max())
