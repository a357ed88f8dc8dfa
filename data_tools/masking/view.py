"""A picture as a model has encoded it: a grid of features, and where its cells lie in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.masking.prompts import Point, Prompt
from data_tools.masking.way import Values


@dataclass(frozen=True)
class View:
    """One encoded picture.

    Attributes:
        size: width and height of the picture in pixels.
        features: float32 [channels, rows, columns] of the cells that lie in the picture, the last ones perhaps in part.
        cell: width and height of a cell in pixels of the picture.
        encoded: what the model wants back of it.
    """

    size: tuple[int, int]
    features: Tensor
    cell: tuple[float, float]
    encoded: Any = None

    def middle(self, index: int) -> Point:
        """Middle of a cell, counted row by row, in pixels of the picture."""
        row, column = divmod(index, self.features.shape[-1])
        x, y = (column + 0.5) * self.cell[0], (row + 0.5) * self.cell[1]
        return min(x, self.size[0] - 1), min(y, self.size[1] - 1)

    def coverage(self, mask: Image.Image) -> Tensor:
        """How much of each cell a mask of the picture (8 bit grey) covers, float32 [rows, columns] in [0, 1]."""
        rows, columns = self.features.shape[-2:]
        box = (0.0, 0.0, columns * self.cell[0], rows * self.cell[1])
        canvas = Image.new("F", (ceil(box[2] - 1e-6), ceil(box[3] - 1e-6)))  # Pillow takes no box beyond the picture
        canvas.paste(mask.convert("F"))
        box = (0.0, 0.0, min(box[2], canvas.width), min(box[3], canvas.height))
        scaled = canvas.resize((columns, rows), Image.Resampling.BOX, box=box)
        return torch.from_numpy(np.array(scaled)).to(self.features.device) / 255


@dataclass(frozen=True)
class Guide:
    """What leads a mask decoder to one subject, as Personalize-SAM does.

    Attributes:
        likeness: of each cell to the subject, float32 [rows, columns].
        target: the subject's features, float32 [channels].
    """

    likeness: Tensor
    target: Tensor


class Segmenter(Protocol):
    """A model that draws the outline of what a prompt points at."""

    def look(self, image: Image.Image) -> View:
        """Encode an RGB picture."""
        ...

    def predict(
        self,
        view: View,
        prompt: Prompt,
        previous: Tensor | None = None,
        guide: Guide | None = None,
        several: bool | None = None,
    ) -> Tensor:
        """Logits of the mask, float32 [h, w], on a grid of the model's own.

        Args:
            prompt: in pixels of the picture.
            previous: logits that it gave before, as a prompt.
            several: let it propose several masks and take the one that it trusts most; by itself it does where one
                point alone leaves open what is meant.
        """
        ...

    def whole(self, view: View, logits: Tensor) -> Values:
        """Logits as a mask of the whole picture."""
        ...
