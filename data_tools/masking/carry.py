"""One annotated mask carried over to other pictures of the subject, without training: Personalize-SAM.

Zhang et al. 2023, arXiv 2305.03048. The features of the subject, averaged within its mask, are compared with those of
every place of another picture. The place that is most alike is a point on the subject, the one least alike a point
beside it; SAM draws the outline in three steps, each of which begins with the mask of the one before.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_tools.masking.prompts import Prompt
from data_tools.masking.view import Guide, Segmenter, View
from data_tools.masking.way import Photo, Values, box_of
from finetune.errors import UserError


def target_of(view: View, mask: Image.Image) -> Tensor:
    """The subject: mean of the features within its mask, each cell by how much of it is covered, float32 [channels].

    Args:
        mask: 8 bit grey, of the picture's size.
    """
    covered = view.coverage(mask)
    return (view.features * covered).sum((-2, -1)) / covered.sum()


def likeness(features: Tensor, target: Tensor) -> Tensor:
    """Cosine of each cell's features [channels, rows, columns] and the target's [channels], float32 [rows, columns]."""
    return F.cosine_similarity(features, target[:, None, None], dim=0)


def location(view: View, alike: Tensor) -> Prompt:
    """The cell most like the subject as a point on it, the one least like it as a point beside it."""
    flat = alike.flatten()
    most, least = (view.middle(int(index)) for index in (flat.argmax(), flat.argmin()))
    return Prompt((most, least), (1, 0))


class CarriedOver:
    """The way that finds the subject of one picture in others.

    Args:
        reference: the annotated picture.
        mask: of it, 8 bit grey, of its size.

    Raises:
        UserError: the mask is of another size, or empty.
    """

    def __init__(self, sam: Segmenter, reference: Photo, mask: Image.Image) -> None:
        if mask.size != reference.rgb.size:
            sizes = f"{mask.width} x {mask.height} pixels, but {reference.path} is {reference.rgb.width} x "
            raise UserError(f"--reference-mask: is {sizes}{reference.rgb.height}")
        if mask.getbbox() is None:
            raise UserError("--reference-mask: is empty (black everywhere), so it shows no subject")
        self.sam, self.mask, self.path = sam, mask, reference.path
        self.target = target_of(sam.look(reference.rgb), mask)

    def __call__(self, photo: Photo) -> Values:
        """As ``Way``. The annotated picture keeps the mask that it was given."""
        if photo.path.resolve() == self.path.resolve():
            return np.asarray(self.mask, dtype=np.float32) / np.float32(255)
        view = self.sam.look(photo.rgb)
        alike = likeness(view.features, self.target)
        prompt = location(view, alike)
        first = self.sam.predict(view, prompt, guide=Guide(alike, self.target), several=False)
        second = self.sam.predict(view, prompt, previous=first, several=True)
        found = self.sam.whole(view, second)
        box = box_of(found > 0.5)
        if box is None:
            return found
        left, top, right, bottom = box
        boxed = replace(prompt, box=(left, top, right, bottom))
        return self.sam.whole(view, self.sam.predict(view, boxed, previous=second, several=True))
