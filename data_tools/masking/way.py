"""What every way to a mask is: a function of a picture. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data import decoding

Values = NDArray[np.float32]
"""How much each pixel of a picture belongs to the subject, [height, width] in [0, 1]."""

Region = NDArray[np.bool_]
"""Pixels that belong to something, [height, width]."""


@dataclass(frozen=True)
class Photo:
    """A picture file, decoded.

    Attributes:
        image: upright, in the file's own colours, its transparency with it.
    """

    path: Path
    image: Image.Image

    @staticmethod
    def read(path: Path) -> Photo:
        """Decode a file.

        Raises:
            UserError: it is no picture, or is broken.
        """
        return Photo(path, decoding.decode(decoding.read(path), path))

    @cached_property
    def rgb(self) -> Image.Image:
        """As a run sees it: 8 bit sRGB."""
        return decoding.rgb(self.image)


class Way(Protocol):
    """A way to a mask."""

    def __call__(self, photo: Photo) -> Values:
        """The subject of a picture.

        Raises:
            UserError: the picture lacks what this way needs.
        """
        ...


def box_of(region: Region) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of a region, its last pixels included; None where it is empty."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
