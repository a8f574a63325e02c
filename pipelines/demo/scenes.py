"""Scenes: what is to be seen in one picture, as facts first and as pixels second.

`sample` draws the facts (one to three things with kind, colour, size and place, and how the first two lie to each
other), `render` paints exactly these. A scene holds everything the painter needs, so the picture is a pure function
of it and a caption can be checked against it. Things are big, apart and marked (see shapes), because tiny models
have to learn kind and colour from some hundred pictures: a ViT of 0.8M weights at 64 px names 9 in 10 kinds and
nearly all colours of held-out things after 470 steps of 32 pictures out of 900. Backgrounds are pale but uneven:
without that, a perceptual hash would take two scenes of one layout for copies of each other. About 3 ms a picture.
"""

import json
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from pipelines.demo.shapes import DETAILS, SHAPES

KINDS = tuple(SHAPES)
COLOURS: dict[str, tuple[int, int, int]] = {  # RGB
    "red": (214, 28, 36),
    "orange": (250, 130, 10),
    "yellow": (240, 210, 20),
    "green": (30, 150, 50),
    "blue": (30, 80, 215),
    "purple": (125, 40, 165),
    "pink": (250, 130, 190),
    "black": (25, 25, 28),
}
SIZES = {"large": (0.55, 0.72), "small": (0.34, 0.42)}  # longest extent as a fraction of the picture's shorter side
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHORTER_SIDE_PX = (96, 400)
CLEARLY = 1.5  # a relation holds where the one distance is so many times the other


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` its centre in pixels, `extent` its longest side in pixels, `angle` in degrees."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    extent: float
    angle: float
    stretch: float  # width over height against the drawing of the kind, 0.85 to 1.15
    mirrored: bool
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture's facts. `relation` says how the first thing lies to the second, None if there is but one."""

    width: int
    height: int
    things: tuple[Thing, ...]
    relation: str | None
    texture: int  # seed of the background

    def facts(self) -> str:
        """The facts a caption may state, as JSON."""
        things = [{"kind": t.kind, "colour": t.colour, "size": t.size, "x": t.x, "y": t.y} for t in self.things]
        return json.dumps({"things": things, "relation": self.relation})


def relation_of(a: Thing, b: Thing) -> str | None:
    """How a lies to b, None where neither direction is clearly the greater."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > CLEARLY * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > CLEARLY * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sample(rng: np.random.Generator, only: tuple[str, str] | None = None) -> Scene:
    """A random scene; `only` = (colour, kind) asks for that single thing."""
    shorter = round(float(np.exp(rng.uniform(*np.log(SHORTER_SIDE_PX)))))
    longer = round(shorter * 2.0 ** float(rng.random() ** 2))  # aspects up to 2, half of them below 1.2
    width, height = (shorter, longer) if rng.random() < 0.5 else (longer, shorter)
    count = 1 if only else int(rng.choice([1, 2, 3], p=[0.45, 0.40, 0.15]))
    kinds = [only[1]] if only else [KINDS[i] for i in rng.permutation(len(KINDS))[:count]]
    colours = [only[0]] if only else [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
    while True:
        sizes = ["large" if rng.random() < (0.55 if count == 1 else 0.4) else "small" for _ in kinds]
        extents = np.array([rng.uniform(*SIZES[size]) for size in sizes]) * min(width, height)
        places = _places(rng, extents, np.array([width, height]))
        if places is not None:
            break
    things = tuple(map(_thing, [rng] * count, kinds, colours, sizes, extents, places))
    relation = relation_of(things[0], things[1]) if count > 1 else None
    return Scene(width, height, things, relation, int(rng.integers(2**31)))


def _places(rng: np.random.Generator, extents: np.ndarray, space: np.ndarray) -> np.ndarray | None:
    """Centres, (n, 2), of things that don't touch, the first two clearly beside or above each other; None: no luck."""
    margin = 0.55 * extents[:, None]
    tries = margin + rng.random((64, len(extents), 2)) * (space - 2 * margin)
    gaps = np.abs(tries[:, :, None] - tries[:, None])  # (try, thing, thing, axis)
    apart = gaps.max(axis=3) > 0.53 * (extents[:, None] + extents)
    fits = (apart | np.eye(len(extents), dtype=bool)).all(axis=(1, 2))
    if len(extents) > 1:
        fits &= gaps[:, 0, 1].max(axis=1) > CLEARLY * gaps[:, 0, 1].min(axis=1) + 1
    return tries[fits.argmax()] if fits.any() else None


def _thing(rng: np.random.Generator, kind: str, colour: str, size: str, extent: float, place: np.ndarray) -> Thing:
    r, g, b = (int(c) for c in np.clip(COLOURS[colour] + rng.normal(0.0, 8.0, 3), 0, 255))
    x, y = (round(float(v), 1) for v in place)
    angle, stretch, mirrored = float(rng.uniform(-12, 12)), float(rng.uniform(0.85, 1.15)), bool(rng.random() < 0.5)
    return Thing(kind, colour, size, x, y, float(extent), angle, stretch, mirrored, (r, g, b))


def render(scene: Scene) -> np.ndarray:
    """The picture, (height, width, 3) uint8, RGB."""
    picture = _background(scene)
    for thing in scene.things:
        _paint(picture, thing)
    return picture


@cache
def _grain() -> np.ndarray:
    """One tile of fine noise that all backgrounds are cut from: drawing it anew would cost more than the scene."""
    return np.random.default_rng(20260101).normal(0.0, 2.5, (1024, 1024, 1)).astype(np.float32)


def _background(scene: Scene) -> np.ndarray:
    rng = np.random.default_rng(scene.texture)
    coarse = rng.uniform(210, 240) + rng.normal(0.0, 5.0, 3) + rng.normal(0.0, 15.0, (5, 5, 1))
    smooth = cv2.resize(coarse.astype(np.float32), (scene.width, scene.height), interpolation=cv2.INTER_CUBIC)
    top, left = (int(v) for v in rng.integers(0, 1024 - 2 * SHORTER_SIDE_PX[1], 2))
    grained = smooth + _grain()[top : top + scene.height, left : left + scene.width]
    return np.clip(grained, 150, 255).astype(np.uint8)


def _paint(picture: np.ndarray, thing: Thing) -> None:
    shades = DETAILS | {"main": thing.rgb}
    turn = np.radians(thing.angle)
    spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    scale = np.array([thing.stretch if thing.stretch < 1 else 1.0, 1 / thing.stretch if thing.stretch > 1 else 1.0])
    scale *= 0.5 * thing.extent * np.array([-1.0 if thing.mirrored else 1.0, 1.0])
    for shade, points in SHAPES[thing.kind]:
        at = (points * scale) @ spin + (thing.x, thing.y)
        fixed = np.round(at * 16).astype(np.int32)  # cv2 takes fixed point with `shift` fractional bits
        cv2.fillPoly(picture, [fixed], shades[shade], lineType=cv2.LINE_AA, shift=4)
