"""Masks without a model: what stands before a plain background, and a picture's own transparency."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_tools.masking.way import Photo, Values, Way
from finetune.data import decoding
from finetune.errors import UserError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Against = Literal["border", "dark", "light"]
BORDER = 0.02
"""How wide the border is that shows the background, as a part of the shorter side."""

BINS = 256


def threshold(against: str) -> Way:
    """The way that keeps what differs from the background by more than a threshold, which is Otsu's.

    Args:
        against: "border" for a background of the colour that the picture has along its border, which may change evenly
            across the picture; "dark" or "light" for a subject that is darker or lighter than its background.

    Raises:
        UserError: another word.
    """
    if against not in get_args(Against):
        raise UserError(f"--threshold {against}: expected one of {', '.join(get_args(Against))}")

    def way(photo: Photo) -> Values:
        if against == "border":
            found = from_border(np.asarray(photo.rgb))
        else:
            grey = np.asarray(photo.rgb.convert("L"), dtype=np.float32)
            found = grey if against == "light" else 255 - grey
        return (found > otsu(found)).astype(np.float32)

    return way


def transparency(photo: Photo) -> Values:
    """How opaque each pixel is.

    Raises:
        UserError: the picture has no transparency.
    """
    if not photo.image.has_transparency_data or photo.image.mode in decoding.DEEP:
        raise UserError(f"{photo.path}: has no transparency to take as its mask")
    return np.asarray(decoding.alpha(photo.image), dtype=np.float32) / np.float32(255)


def from_border(pixels: Bytes) -> Floats:
    """How far each pixel's colour is from the background's, [h, w].

    The background is the plane over the picture, a + bx + cy in each channel, that is nearest to the colours along the
    border: backdrops are seldom lit evenly.

    Args:
        pixels: [h, w, 3].
    """
    high, wide = pixels.shape[:2]
    width = max(1, round(BORDER * min(high, wide)))
    border = np.ones((high, wide), dtype=bool)
    border[width:-width, width:-width] = False
    down, across = np.nonzero(border)
    places = np.stack([np.ones(len(down)), across, down], axis=-1)
    planes, *_ = np.linalg.lstsq(places, pixels[border].astype(np.float64), rcond=None)
    square = np.zeros((high, wide), dtype=np.float32)
    for channel, (level, right, below) in enumerate(planes.T):  # one by one: photographs are large
        ground = level + right * np.arange(wide) + below * np.arange(high)[:, None]
        square += (pixels[..., channel] - ground).astype(np.float32) ** 2
    return np.sqrt(square).round()  # finer differences are those of rounding, and would be found in a plain picture


def otsu(values: Floats) -> float:
    """The threshold that parts values into the two classes whose means are furthest apart (Otsu 1979).

    It makes w0 · w1 · (m0 - m1)², the variance between the classes, largest; values above it are the upper class. For
    values that are all the same it is that value, so that nothing is above it.
    """
    counts, edges = np.histogram(values, BINS)
    if values.min() == values.max():
        return float(values.max())
    share, middles = counts / counts.sum(), (edges[:-1] + edges[1:]) / 2
    below, mean_below = np.cumsum(share)[:-1], np.cumsum(share * middles)[:-1]
    mean = float((share * middles).sum())
    between = (mean * below - mean_below) ** 2 / (below * (1 - below)).clip(min=1e-12)
    best = np.flatnonzero(between == between.max())  # between two peaks far apart every threshold is as good
    return float(edges[1:][int(best.mean())])
