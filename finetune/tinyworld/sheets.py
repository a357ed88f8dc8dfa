"""Contact sheets: many small pictures on one, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def sheet(pictures: Sequence[Image.Image], columns: int = 8, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows of ``columns``, each enlarged ``zoom`` times without smoothing, on white."""
    width, height = (side * zoom + gap for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for at, picture in enumerate(pictures):
        row, column = divmod(at, columns)
        enlarged = picture.convert("RGB").resize((width - gap, height - gap), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (column * width + gap, row * height + gap))
    return canvas


def from_floats(pictures: np.ndarray) -> list[Image.Image]:
    """Float (N, 3, h, w) in [0, 1] to PIL pictures."""
    bytes_ = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in bytes_]
