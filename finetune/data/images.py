"""Decoded pictures to tensors of what is cut from them, and masks to the latent grid. A pure function of the file."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune.data import decoding
from finetune.data.framing import Crop
from finetune.data.masks import ALPHA
from finetune.data.sources import Picture
from finetune.errors import UserError

VERSION = 2
"""Of everything here and in ``decoding`` that changes pixels; part of the cache's keys."""

SPARE = 2
"""How many times larger than it is needed a JPEG is decoded at least, so that Lanczos has what it averages."""


def geometry(picture: Picture, crop: Crop, flipped: bool = False) -> Tensor:
    """What SDXL is told of a picture, int64 [6].

    Original height and width; top and left of the crop in the scaled (and mirrored) picture; target height and width.
    """
    left = crop.width - crop.target.width - crop.left if flipped else crop.left
    return torch.tensor(
        [picture.facts.height, picture.facts.width, crop.top, left, crop.target.height, crop.target.width]
    )


def pixels(picture: Picture, crop: Crop) -> Tensor:
    """What is cut from a picture, float32 [3, height, width] in [-1, 1].

    Raises:
        UserError: the file is no longer the one that was scanned.
    """
    image = _cut(whole(picture, _shrink(picture, crop)), crop, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def whole(picture: Picture, shrink: int = 1) -> Image.Image:
    """All of a picture, upright, 8 bit sRGB.

    Args:
        shrink: as of ``decoding.decode``.

    Raises:
        UserError: the file is no longer the one that was scanned.
    """
    content = decoding.read(picture.path)
    if hashlib.sha256(content).hexdigest() != picture.facts.sha256:
        raise UserError(f"{picture.path}: has changed since this run began; start it again")
    return decoding.rgb(decoding.decode(content, picture.path, shrink))


def _shrink(picture: Picture, crop: Crop) -> int:
    """The smallest part of a picture that is ``SPARE`` times what is needed, and has no half pixels at its edges."""
    width, height = picture.facts.width, picture.facts.height
    for shrink in decoding.SHRINKS:
        whole_pixels = width % shrink == height % shrink == 0
        if whole_pixels and width >= shrink * SPARE * crop.width and height >= shrink * SPARE * crop.height:
            return shrink
    return 1


def mask(picture: Picture, crop: Crop, scale: int) -> Tensor:
    """How much each place of what is cut counts, float32 [1, height / scale, width / scale] in [0, 1].

    Ones for a picture without a mask.

    Args:
        scale: pixels per latent cell.

    Raises:
        UserError: nothing of the mask is left in the crop.
    """
    cells = crop.target.height // scale, crop.target.width // scale
    if picture.mask is None:
        return torch.ones(1, *cells)
    path = picture.path if isinstance(picture.mask, str) else picture.mask
    image = decoding.decode(decoding.read(path), path)
    grey = decoding.alpha(image) if picture.mask == ALPHA else decoding.grey(image)
    cut = torch.from_numpy(np.array(_cut(grey, crop, Image.Resampling.BOX))).float() / 255
    if not cut.any():
        raise UserError(f"{path}: nothing of the mask is left in what is cut from the picture: {crop}")
    return F.interpolate(cut[None, None], size=cells, mode="area")[0]


def _cut(image: Image.Image, crop: Crop, filter: Image.Resampling) -> Image.Image:
    """What is cut from a picture once it is scaled. Nothing else is scaled."""
    left, top, (wide, high) = crop.left, crop.top, crop.target
    if (crop.width, crop.height) == image.size:
        return image.crop((left, top, left + wide, top + high))
    across, down = image.width / crop.width, image.height / crop.height
    right, bottom = min(image.width, (left + wide) * across), min(image.height, (top + high) * down)
    return image.resize(crop.target, filter, (left * across, top * down, right, bottom))
