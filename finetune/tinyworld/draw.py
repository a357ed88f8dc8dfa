"""Shapes and fills in an object's own coordinates, and how they are laid on a picture.

An object lives in a unit square: ``u`` runs to the right and ``v`` down, both from -0.5 to 0.5. A *shape* says which
points belong to the object, a *paint* gives every point a colour. Both are functions of position alone, so they are
drawn at ``SUPERSAMPLE`` times the picture's resolution and averaged down: edges come out smooth, and the coverage of
every pixel is the object's exact mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Inside = NDArray[np.bool_]
Shape = Callable[[Array, Array], Inside]
Paint = Callable[[Array, Array], Array]
"""Colours, float in [0, 1], of shape (..., 3) for points given by their ``u`` and ``v``."""

SIDE = 64
SUPERSAMPLE = 4


def _radius(u: Array, v: Array) -> Array:
    return np.hypot(u, v)


def _star(u: Array, v: Array) -> Inside:
    """Five points; the edge from a tip to the next notch is a straight line in polar coordinates."""
    outer, inner, half = 0.52, 0.235, np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)  # 0 at a tip, half at a notch
    return _radius(u, v) * (inner * np.sin(half - angle) + outer * np.sin(angle)) <= outer * inner * np.sin(half)


def _heart(u: Array, v: Array) -> Inside:
    x, y = 2.35 * u, 0.12 - 2.45 * v
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


SHAPES: dict[str, Shape] = {
    "circle": lambda u, v: _radius(u, v) <= 0.5,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.44,
    "triangle": lambda u, v: (v <= 0.44) & (np.abs(u) <= (v + 0.5) * 0.55),
    "star": _star,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.165) & (np.maximum(np.abs(u), np.abs(v)) <= 0.5),
    "ring": lambda u, v: (_radius(u, v) <= 0.5) & (_radius(u, v) >= 0.24),
    "diamond": lambda u, v: np.abs(u) / 0.38 + np.abs(v) / 0.53 <= 1,
    "heart": _heart,
}

FILLS: dict[str, Shape] = {  # where the second tone shows; every feature is at least 5 pixels of the smallest object
    "solid": lambda u, v: np.zeros(np.broadcast(u, v).shape, bool),
    "striped": lambda u, v: (v / 0.4 + 0.25) % 1 >= 0.5,
    "dotted": lambda u, v: _radius((u / 0.34 + 0.5) % 1 - 0.5, (v / 0.34 + 0.5) % 1 - 0.5) <= 0.34,
    "checkered": lambda u, v: (np.floor(u / 0.24) + np.floor(v / 0.24)) % 2 >= 1,
}


def lay(picture: Array, shape: Shape, paint: Paint, cx: float, cy: float, size: float) -> tuple[Array, Array]:
    """Lay an object of diameter ``size`` pixels with its middle at ``(cx, cy)`` on a picture.

    Args:
        picture: float (SIDE, SIDE, 3) in [0, 1]; left as it is.
        shape: the points that belong to the object.
        paint: the colour of those points.

    Returns:
        The new picture and the object's coverage of each pixel, float (SIDE, SIDE) in [0, 1].
    """
    reach = size * 0.56 + 1  # the largest shape stands out of its unit square a little
    left, right = max(0, int(cx - reach)), min(SIDE, int(np.ceil(cx + reach)))
    top, bottom = max(0, int(cy - reach)), min(SIDE, int(np.ceil(cy + reach)))
    u = (left + (np.arange((right - left) * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - cx)[None, :] / size
    v = (top + (np.arange((bottom - top) * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - cy)[:, None] / size
    inside = shape(u, v).astype(np.float64)
    colour = average(paint(u, v) * inside[..., None])
    coverage = average(inside)
    result, mask = picture.copy(), np.zeros((SIDE, SIDE))
    mask[top:bottom, left:right] = coverage
    result[top:bottom, left:right] = picture[top:bottom, left:right] * (1 - coverage[..., None]) + colour
    return result, mask


def average(fine: Array) -> Array:
    """Mean over blocks of SUPERSAMPLE x SUPERSAMPLE points: (h*S, w*S, ...) -> (h, w, ...)."""
    height, width = fine.shape[0] // SUPERSAMPLE, fine.shape[1] // SUPERSAMPLE
    return fine.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, *fine.shape[2:]).mean((1, 3))


def to_bytes(picture: Array) -> NDArray[np.uint8]:
    """Float [0, 1] to uint8 [0, 255], rounded to the nearest."""
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
