"""Decoded pictures to square tensors, and masks to the latent grid. A pure function of the file and the settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune.data import decoding
from finetune.data.sources import ALPHA, Picture
from finetune.errors import UserError

VERSION = 1
"""Of everything here and in ``decoding`` that changes pixels; part of the cache's keys."""


class Crop(NamedTuple):
    """Where the square lies once the shorter side has been scaled to it, in pixels."""

    width: int
    height: int
    left: int
    top: int


def crop(width: int, height: int, side: int) -> Crop:
    """The central square: scale the shorter side to ``side``, round the longer to the nearest pixel, cut evenly.

    An odd pixel is cut at the right and at the bottom.
    """
    scale = side / min(width, height)
    scaled_width, scaled_height = (max(side, int(length * scale + 0.5)) for length in (width, height))
    return Crop(scaled_width, scaled_height, (scaled_width - side) // 2, (scaled_height - side) // 2)


def geometry(picture: Picture, side: int, flipped: bool = False) -> Tensor:
    """What SDXL is told of a picture, int64 [6].

    Original height and width; top and left of the crop in the scaled (and mirrored) picture; target height and width.
    """
    width, height = picture.facts.width, picture.facts.height
    square = crop(width, height, side)
    left = square.width - side - square.left if flipped else square.left
    return torch.tensor([height, width, square.top, left, side, side])


def pixels(picture: Picture, side: int) -> Tensor:
    """The central square of a picture, float32 [3, side, side] in [-1, 1].

    Raises:
        UserError: the file is no longer the one that was scanned.
    """
    image = _square(whole(picture), side, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def whole(picture: Picture) -> Image.Image:
    """All of a picture, upright, 8 bit sRGB.

    Raises:
        UserError: the file is no longer the one that was scanned.
    """
    content = decoding.read(picture.path)
    if hashlib.sha256(content).hexdigest() != picture.facts.sha256:
        raise UserError(f"{picture.path}: has changed since this run began; start it again")
    return decoding.rgb(decoding.decode(content, picture.path))


def mask(picture: Picture, side: int, scale: int) -> Tensor:
    """How much each place of a picture counts, float32 [1, side / scale, side / scale] in [0, 1]; ones without a mask.

    Args:
        side: of the square, in pixels.
        scale: pixels per latent cell.

    Raises:
        UserError: nothing of the mask is left in the square.
    """
    cells = side // scale
    if picture.mask is None:
        return torch.ones(1, cells, cells)
    path = picture.path if picture.mask == ALPHA else Path(picture.mask)
    image = decoding.decode(decoding.read(path), path)
    grey = decoding.alpha(image) if picture.mask == ALPHA else decoding.grey(image)
    square = torch.from_numpy(np.array(_square(grey, side, Image.Resampling.BOX))).float() / 255
    if not square.any():
        raise UserError(f"{path}: nothing of the mask is left in the central square of the picture")
    return F.interpolate(square[None, None], size=(cells, cells), mode="area")[0]


def _square(image: Image.Image, side: int, filter: Image.Resampling) -> Image.Image:
    width, height, left, top = crop(image.width, image.height, side)
    scaled = image if (width, height) == image.size else image.resize((width, height), filter)
    return scaled.crop((left, top, left + side, top + side))
