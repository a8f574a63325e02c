"""The defects that canaries are planted with, each with its twin: the same pair, encoded the same way, without it.

A defect says how its canaries are asked. Row-local filters are simply run on both. Reducers are queried: a duplicate's
canary against the corpus with its original, every other one and all twins without it, since the original being there
isn't their defect. Where the defect is the text, it is caught when the web's text isn't kept.
Every draw is a hash of the seed and the origin's uid. Cost: one decoding and two encodings per canary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from filters.canary_texts import BOILERPLATE, SENTENCES
from pairs.identity import unit_hash

QUALITY = 90
MARKS = ("PREVIEW ONLY", "sample copy", "do not reproduce", "licensed stock", "(c) image bank")


@dataclass(frozen=True)
class Given:
    """What a canary is made from: the origin's HxWx3 uint8 BGR pixels and first text; `partner` is another's text."""

    uid: str
    seed: int
    pixels: np.ndarray
    language: str | None = None
    partner: str | None = None

    def draw(self, what: str) -> float:
        """A uniform draw in [0, 1)."""
        return unit_hash(self.seed, what, self.uid)

    def choose(self, what: str, choices: Sequence[str]) -> str:
        return choices[int(self.draw(what) * len(choices))]


@dataclass(frozen=True)
class Planted:
    """A canary and its twin. Without `pixels` both are the origin's own bytes, without `twin` both show `pixels`,
    without `text` both keep the origin's. `kind` groups canaries in the report, `how` says all."""

    kind: str
    how: str
    pixels: np.ndarray | None = None
    twin: np.ndarray | None = None
    quality: int = QUALITY
    text: str | None = None


@dataclass(frozen=True)
class Defect:
    """`plant` makes a canary, or None where this origin can't have one. `duplicate`: its original in the corpus is the
    defect. `text`: the web's text is."""

    plant: Callable[[Given], Planted | None]
    duplicate: bool = False
    text: bool = False


def _swapped(given: Given) -> Planted | None:
    if given.partner is None:
        return None
    return Planted("swapped", "another pair's text", given.pixels, text=given.partner)


def _same_bytes(given: Given) -> Planted:
    return Planted("same bytes", "the same file at another address")


def _near_copy(given: Given) -> Planted:
    """Resized to 60 to 95 %, re-encoded at quality 50 to 80, cropped by 1 to 3 % of each side, or mirrored."""
    draw, (height, width) = given.draw("how much"), given.pixels.shape[:2]
    kind = given.choose("how", ("resized", "re-encoded", "cropped", "mirrored"))
    if kind == "resized":
        scale = 0.6 + 0.35 * draw
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return Planted(kind, f"to {scale:.2f}", cv2.resize(given.pixels, size, interpolation=cv2.INTER_AREA))
    if kind == "re-encoded":
        quality = round(50 + 30 * draw)
        return Planted(kind, f"at quality {quality}", given.pixels, quality=quality)
    if kind == "mirrored":
        return Planted(kind, "left to right", cv2.flip(given.pixels, 1))
    cut = 0.01 + 0.02 * draw
    top, left = round(height * cut), round(width * cut)
    return Planted(kind, f"by {cut:.3f} of each side", given.pixels[top : height - top, left : width - left])


def _watermark(given: Given) -> Planted:
    """Translucent words over the image: across its middle, in a corner, or all over it."""
    words, kind = given.choose("mark", MARKS), given.choose("how", ("middle", "corner", "tiled"))
    opacity = 0.35 + 0.3 * given.draw("how much")
    height, width = given.pixels.shape[:2]
    share = {"middle": 0.9, "corner": 0.45, "tiled": 0.5}[kind]
    font, thick = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(min(height, width) / 128))
    scale = share * width / cv2.getTextSize(words, font, 1.0, 1)[0][0]
    wide, tall = cv2.getTextSize(words, font, scale, thick)[0]
    places = [((width - wide) // 2, (height + tall) // 2)] if kind == "middle" else [(width - wide - 2, height - 4)]
    if kind == "tiled":
        places = [(x, y) for y in range(2 * tall, height, 4 * tall + 4) for x in range(2, width, wide + 2 * tall)]
    mask = np.zeros((height, width), np.uint8)
    for place in places:
        cv2.putText(mask, words, place, font, scale, 255, thick, cv2.LINE_AA)
    weight = (mask.astype(np.float32) / 255 * opacity)[..., None]
    marked = given.pixels * (1 - weight) + np.float32(255) * weight
    how = f"{words!r} at {opacity:.2f}"
    return Planted(kind, how, np.clip(np.rint(marked), 0, 255).astype(np.uint8), given.pixels)


def _blank(given: Given) -> Planted:
    """One colour: white, black, grey or the image's mean; half of them with a thin frame, as placeholders have."""
    mean = tuple(int(c) for c in given.pixels.reshape(-1, 3).mean(axis=0))
    colours = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (204, 204, 204), "mean": mean}
    name = given.choose("colour", list(colours))
    pixels = np.empty_like(given.pixels)
    pixels[:] = colours[name]
    kind = given.choose("how", ("plain", "framed"))
    if kind == "framed":
        height, width = pixels.shape[:2]
        cv2.rectangle(pixels, (0, 0), (width - 1, height - 1), (128, 128, 128), max(1, min(height, width) // 64))
    return Planted(kind, name, pixels, given.pixels)


def _boilerplate(given: Given) -> Planted:
    text = given.choose("boilerplate", BOILERPLATE)
    return Planted("boilerplate", text, given.pixels, text=text)


def _other_language(given: Given) -> Planted:
    """A sentence of a language that the page doesn't declare; what it says is none of the image's business either."""
    declared = (given.language or "").lower().split("-")[0]
    others = [(code, sentence) for code, sentence in SENTENCES if code != declared]
    language, sentence = others[int(given.draw("sentence") * len(others))]
    return Planted(language, sentence, given.pixels, text=sentence)


DEFECTS = {
    "swapped_text": Defect(_swapped, text=True),
    "exact_duplicate": Defect(_same_bytes, duplicate=True),
    "near_duplicate": Defect(_near_copy, duplicate=True),
    "watermark": Defect(_watermark),
    "blank": Defect(_blank),
    "boilerplate_text": Defect(_boilerplate, text=True),
    "other_language": Defect(_other_language, text=True),
}
