"""Ten kinds of object as polygons: what a scene is drawn from.

A shape is a list of layers, painted in order; a layer is a shade and a polygon in the unit square [-1, 1] x [-1, 1]
(x to the right, y downwards). Polygons, because one call of cv2.fillPoly then draws any of them anti-aliased at
any place, size and angle. The silhouettes differ so much that a model of a million weights tells them apart.
"""

from collections.abc import Sequence

import numpy as np

Points = np.ndarray  # (n, 2) float64, unit square
Layer = tuple[str, Points]  # shade: "main" (the object's colour), "dark" or "light" (details)


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
        ("main", _box(-0.78, -0.15, 0.78, 1.0)),
        ("dark", _poly((-1.0, -0.1), (0.0, -1.0), (1.0, -0.1))),
        ("light", _box(-0.5, 0.15, -0.1, 0.55)),
        ("light", _box(0.2, 0.25, 0.55, 1.0)),
    ],
    "tree": [
        ("dark", _box(-0.14, 0.2, 0.14, 1.0)),
        ("main", _poly((0.0, -1.0), (0.5, -0.4), (-0.5, -0.4))),
        ("main", _poly((0.0, -0.75), (0.68, 0.05), (-0.68, 0.05))),
        ("main", _poly((0.0, -0.4), (0.85, 0.55), (-0.85, 0.55))),
    ],
    "fish": [
        ("main", _poly((0.3, 0.0), (1.0, -0.55), (0.82, 0.0), (1.0, 0.55))),
        ("dark", _poly((-0.3, -0.35), (0.2, -0.75), (0.3, -0.3))),
        ("main", _arc(-0.25, 0.0, 0.75, 0.46)),
        ("light", _arc(-0.62, -0.12, 0.11, 0.11)),
        ("dark", _poly((-0.2, 0.05), (0.15, -0.1), (0.15, 0.25))),
    ],
    "boat": [
        ("dark", _box(-0.06, -1.0, 0.04, 0.4)),
        ("main", _poly((0.1, -0.95), (0.85, 0.25), (0.1, 0.25))),
        ("light", _poly((-0.12, -0.7), (-0.12, 0.25), (-0.65, 0.25))),
        ("main", _poly((-1.0, 0.4), (1.0, 0.4), (0.65, 0.9), (-0.65, 0.9))),
    ],
    "car": [
        ("main", _poly((-0.6, 0.0), (-0.35, -0.5), (0.35, -0.5), (0.65, 0.0))),
        ("main", _poly((-1.0, 0.0), (0.85, -0.05), (1.0, 0.12), (1.0, 0.4), (-1.0, 0.4))),
        ("light", _poly((-0.43, -0.04), (-0.26, -0.38), (-0.04, -0.38), (-0.04, -0.04))),
        ("light", _poly((0.07, -0.04), (0.07, -0.38), (0.28, -0.38), (0.46, -0.04))),
        ("dark", _arc(-0.52, 0.42, 0.25, 0.25)),
        ("dark", _arc(0.52, 0.42, 0.25, 0.25)),
        ("light", _arc(-0.52, 0.42, 0.1, 0.1)),
        ("light", _arc(0.52, 0.42, 0.1, 0.1)),
    ],
    "flower": [
        ("dark", _box(-0.06, -0.3, 0.06, 1.0)),
        ("dark", _poly((0.0, 0.85), (0.2, 0.45), (0.6, 0.35), (0.4, 0.7))),
        *_petals(6, -0.35),
        ("light", _arc(0.0, -0.35, 0.22, 0.22)),
    ],
    "cup": [
        ("main", _ring(0.5, 0.0, 0.46, 0.26, -90, 90)),
        ("main", _poly((-0.85, -0.65), (0.65, -0.65), (0.42, 0.8), (-0.62, 0.8))),
        ("light", _arc(-0.1, -0.62, 0.72, 0.14)),
    ],
    "star": [("main", _star(5, 0.42))],
    "umbrella": [
        ("dark", _box(-0.05, 0.0, 0.05, 0.8)),
        ("dark", _ring(0.17, 0.8, 0.22, 0.12, 0, 180)),
        ("main", _scallops()),
    ],
    "key": [
        ("main", _ring(-0.6, 0.0, 0.4, 0.19)),
        ("main", _box(-0.24, -0.1, 1.0, 0.1)),
        ("main", _box(0.45, 0.05, 0.6, 0.38)),
        ("main", _box(0.8, 0.05, 0.95, 0.45)),
    ],
}
