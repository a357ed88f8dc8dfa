"""What is done to a mask before it is written: cut, cleaned, grown, feathered. Pillow and NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_tools.masking.parts import filled, largest
from data_tools.masking.way import Values

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is done, in this order.

    Attributes:
        cut: pixels of at least this value belong to the subject; all others are black.
        soft: those that belong to it keep their values; without it they are white.
        largest: only the largest connected part stays.
        fill: holes are closed.
        grow: pixels by which it becomes wider on all sides; negative ones make it narrower.
        feather: radius of a blur of its edge, in pixels.
    """

    cut: float = 0.5
    soft: bool = False
    largest: bool = False
    fill: bool = False
    grow: int = 0
    feather: float = 0.0

    def apply(self, values: Values) -> Image.Image:
        """The mask as it is written, 8 bit grey."""
        kept = values >= self.cut
        if self.largest:
            kept = largest(kept)
        whole = filled(kept) if self.fill else kept
        values = np.where(kept, values if self.soft else 1, whole)
        mask = grown((255 * values.clip(0, 1)).round().astype(np.uint8), self.grow)
        image = Image.fromarray(mask)
        return image.filter(ImageFilter.GaussianBlur(self.feather)) if self.feather else image


def grown(mask: Bytes, by: int) -> Bytes:
    """A mask, [h, w], wider by so many pixels on all sides, or narrower.

    Every pixel takes the largest value near it; what is near is an octagon, which two kinds of neighbours in turn come
    to. A subject that the edge of the picture cuts off is not made narrower there.
    """
    if by < 0:
        return np.asarray(255 - grown(255 - mask, -by), dtype=np.uint8)
    for step in range(by):
        across = _with_neighbours(mask, 1)
        mask = _with_neighbours(across, 0) if step % 2 else np.maximum(across, _with_neighbours(mask, 0))
    return mask


def _with_neighbours(mask: Bytes, axis: int) -> Bytes:
    """The largest of each pixel and the two beside it along an axis."""
    mask = np.moveaxis(mask, axis, 0)
    most = mask.copy()
    np.maximum(most[1:], mask[:-1], out=most[1:])
    np.maximum(most[:-1], mask[1:], out=most[:-1])
    return np.moveaxis(most, 0, axis)
