"""Hashes of the pixels, for finding the same picture again: exact, and perceptual.

`phash` keeps the signs of the low frequencies of a 32×32 grey thumbnail against their median (the common pHash),
`dhash` the signs of the differences of neighbours in a 9×8 one. `phash_256` (16×16 frequencies of a 64×64 thumbnail)
and `dhash_256` (differences in a 17×16 one) tell apart what collides in 64 bits.
A resized, lightly cropped or re-encoded copy differs in a few bits.
A perceptual hash of a blank image says nothing: it is null where the thumbnail is one colour. About 0.5 ms an image.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.base import Batch, Filter
from pairs.errors import PairmillError

FLAT = 2.0  # grey levels between darkest and brightest pixel of a thumbnail that count as one colour


HASHES = ("phash", "dhash", "phash_256", "dhash_256", "sha256")


@dataclass(frozen=True)
class ImageHash(Filter):
    """`phash`, `dhash`: 64 bits in 16 hex digits; `phash_256`, `dhash_256`: 256 bits in 64; `sha256` of RGB pixels and
    sides. `only` names those that are wanted: each costs 0.1 to 0.3 ms."""

    only: tuple[str, ...] = HASHES

    version = 2
    needs = ("pixels",)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(HASHES)) or not self.only:
            raise PairmillError(
                expected=f"image_hash.only to name some of {', '.join(HASHES)}",
                found=", ".join(unknown) if isinstance(unknown, list) else "none",
                remedy="correct it, or leave it out for all",
            )

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        return dict.fromkeys((name for name in HASHES if name in self.only), pa.string())

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        rows = [{} if image is None else hashes(image, self.only) for image in batch.pixels]
        return {name: [row.get(name) for row in rows] for name in self.columns}


def hashes(image: np.ndarray, only: Collection[str] = HASHES) -> dict[str, str]:
    """The hashes of an HxWx3 uint8 RGB image that `only` names; perceptual ones are left out where it is blank."""
    found = {}
    if "sha256" in only:
        content = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        found["sha256"] = content.hexdigest()
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.max() - small.min() <= FLAT:
        return found
    made = {
        "phash": lambda: phash(small, 8),
        "dhash": lambda: dhash(grey, 8),
        "phash_256": lambda: phash(small, 16),
        "dhash_256": lambda: dhash(grey, 16),
    }
    return found | {name: make() for name, make in made.items() if name in only}


def phash(small: np.ndarray, side: int) -> str:
    """Signs of the `side`×`side` lowest frequencies against their median, of a 64×64 float32 grey thumbnail."""
    edge = side * 4
    thumbnail = small if edge == 64 else cv2.resize(small, (edge, edge), interpolation=cv2.INTER_AREA)
    low = cv2.dct(thumbnail)[:side, :side]
    return _hex(low > np.median(low))


def dhash(grey: np.ndarray, side: int) -> str:
    """Whether each pixel of a (`side` + 1)×`side` thumbnail is darker than its right neighbour; `grey` is HxW uint8."""
    small = cv2.resize(grey, (side + 1, side), interpolation=cv2.INTER_AREA)
    return _hex(small[:, 1:] > small[:, :-1])


def _hex(bits: np.ndarray) -> str:
    return np.packbits(bits.ravel()).tobytes().hex()
