"""Ten kinds of object as polygons: what a scene is drawn from.

A shape is a list of layers, painted in order; a layer is a shade and a polygon in the unit square [-1, 1] x [-1, 1]
(x to the right, y downwards). Polygons, because one call of cv2.fillPoly then draws any of them anti-aliased at
any place, size and angle. Silhouettes and details both differ from kind to kind.
"""

from collections.abc import Sequence

import numpy as np

Points = np.ndarray  # (n, 2) float64, unit square
Layer = tuple[str, Points]  # "main", the object's own colour, or the name of a detail's

# Details have colours that no caption names, the same for every object of a kind: with a local mark beside the
# silhouette, a tiny model learns the kinds from hundreds of pictures instead of tens of thousands.
DETAILS: dict[str, tuple[int, int, int]] = {  # RGB
    "maroon": (105, 20, 35),
    "cream": (250, 240, 195),
    "brown": (105, 65, 30),
    "teal": (0, 125, 120),
    "white": (252, 252, 252),
    "navy": (25, 35, 95),
    "cyan": (120, 215, 235),
    "coal": (60, 62, 66),
    "olive": (115, 125, 40),
    "tan": (195, 150, 95),
    "lime": (195, 240, 70),
    "lavender": (190, 170, 240),
    "steel": (135, 145, 160),
}


def _poly(*xy: tuple[float, float]) -> Points:
    return np.array(xy, dtype=np.float64)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return _poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> Points:
    """Points on an ellipse, from `start` to `end` in degrees, clockwise from the right."""
    turn = np.radians(np.linspace(start, end, 33))
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def _ring(x: float, y: float, outer: float, inner: float, start: float = 0.0, end: float = 360.0) -> Points:
    """A band between two circles as one polygon: out along the one, back along the other."""
    return np.concatenate([_arc(x, y, outer, outer, start, end), _arc(x, y, inner, inner, start, end)[::-1]])


def _star(points: int, inner: float) -> Points:
    turn = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _petals(count: int, y: float) -> list[Layer]:
    turns = np.arange(count) * 2 * np.pi / count
    return [("main", _arc(0.42 * np.cos(t), y + 0.42 * np.sin(t), 0.26, 0.26)) for t in turns]


def _scallops() -> Points:
    """The canopy of an umbrella: half a disc with three bows cut into its lower edge."""
    bows = [_arc(x, 0.05, 1 / 3, 0.18, 360, 180) for x in (2 / 3, 0.0, -2 / 3)]
    return np.concatenate([_arc(0, 0.05, 1.0, 0.95, 180, 360), *bows])


SHAPES: dict[str, Sequence[Layer]] = {
    "house": [
        ("main", _box(-0.8, -0.1, 0.8, 1.0)),
        ("maroon", _poly((-1.0, -0.05), (0.0, -1.0), (1.0, -0.05))),
        ("cream", _box(-0.55, 0.2, -0.1, 0.6)),
        ("maroon", _box(0.2, 0.3, 0.58, 1.0)),
    ],
    "tree": [
        ("brown", _box(-0.22, 0.2, 0.22, 1.0)),
        ("main", _poly((0.0, -1.0), (0.5, -0.4), (-0.5, -0.4))),
        ("main", _poly((0.0, -0.75), (0.68, 0.05), (-0.68, 0.05))),
        ("main", _poly((0.0, -0.4), (0.85, 0.5), (-0.85, 0.5))),
    ],
    "fish": [
        ("teal", _poly((0.3, 0.0), (1.0, -0.6), (0.82, 0.0), (1.0, 0.6))),
        ("teal", _poly((-0.4, -0.3), (0.1, -0.85), (0.3, -0.25))),
        ("main", _arc(-0.25, 0.0, 0.75, 0.5)),
        ("white", _arc(-0.62, -0.12, 0.14, 0.14)),
        ("teal", _poly((-0.25, 0.08), (0.2, -0.12), (0.2, 0.32))),
    ],
    "boat": [
        ("navy", _box(-0.08, -1.0, 0.06, 0.4)),
        ("navy", _poly((0.1, -0.95), (0.9, 0.2), (0.1, 0.2))),
        ("white", _poly((-0.12, -0.75), (-0.12, 0.2), (-0.75, 0.2))),
        ("main", _poly((-1.0, 0.3), (1.0, 0.3), (0.65, 1.0), (-0.65, 1.0))),
    ],
    "car": [
        ("main", _poly((-0.65, 0.0), (-0.38, -0.6), (0.38, -0.6), (0.7, 0.0))),
        ("main", _poly((-1.0, -0.02), (0.85, -0.07), (1.0, 0.12), (1.0, 0.45), (-1.0, 0.45))),
        ("cyan", _poly((-0.47, -0.04), (-0.28, -0.48), (-0.04, -0.48), (-0.04, -0.04))),
        ("cyan", _poly((0.07, -0.04), (0.07, -0.48), (0.3, -0.48), (0.5, -0.04))),
        ("coal", _arc(-0.52, 0.45, 0.29, 0.29)),
        ("coal", _arc(0.52, 0.45, 0.29, 0.29)),
    ],
    "flower": [
        ("olive", _box(-0.09, -0.3, 0.09, 1.0)),
        ("olive", _poly((0.0, 0.9), (0.2, 0.4), (0.7, 0.3), (0.45, 0.75))),
        ("olive", _poly((0.0, 0.9), (-0.2, 0.4), (-0.7, 0.3), (-0.45, 0.75))),
        *_petals(6, -0.35),
        ("cream", _arc(0.0, -0.35, 0.24, 0.24)),
    ],
    "cup": [
        ("main", _ring(0.5, 0.0, 0.48, 0.26, -90, 90)),
        ("main", _poly((-0.85, -0.65), (0.65, -0.65), (0.42, 0.8), (-0.62, 0.8))),
        ("brown", _arc(-0.1, -0.62, 0.75, 0.22)),
        ("white", _poly((-0.78, -0.15), (0.56, -0.15), (0.49, 0.25), (-0.72, 0.25))),
    ],
    "star": [("main", _star(5, 0.55)), ("lime", 0.55 * _star(5, 0.55))],
    "umbrella": [
        ("tan", _box(-0.07, 0.0, 0.07, 0.8)),
        ("tan", _ring(0.17, 0.8, 0.24, 0.1, 0, 180)),
        ("main", _scallops()),
        ("lavender", _poly((0.0, -0.9), (0.33, 0.0), (-0.33, 0.0))),
    ],
    "key": [
        ("main", _ring(-0.58, 0.0, 0.42, 0.17)),
        ("steel", _box(-0.2, -0.13, 1.0, 0.13)),
        ("steel", _box(0.4, 0.05, 0.6, 0.45)),
        ("steel", _box(0.78, 0.05, 0.98, 0.5)),
    ],
}
