"""Pictures with the outlines of their masks, to look at before a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import tiles
from data_tools.masking.folder import Made
from data_tools.masking.shape import grown
from data_tools.masking.way import Photo
from data_tools.tiles import TILE, Heading, Tile
from finetune.data import decoding

DIM = 0.35  # how bright places are that do not count
OUTLINE = (255, 0, 160)


def write(path: Path, made: Sequence[Made], title: str) -> Path:
    """Write a sheet as a page (``.html``) or as a picture (``.png``): each picture with its outline, and its mask.

    Raises:
        UserError: another ending.
    """
    lead = "What counts is bright and has an outline; beside it the mask, and how much of the picture counts."
    return tiles.write(path, [_tile(one) for one in made], Heading("masks", title, lead), width=2 * TILE)


def _tile(made: Made) -> Tile:
    picture = Photo.read(made.picture).rgb
    picture.thumbnail((TILE, TILE))
    whole = decoding.grey(decoding.decode(decoding.read(made.mask), made.mask))
    mask = whole.resize(picture.size, Image.Resampling.BOX)
    both = Image.new("RGB", (2 * picture.width, picture.height))
    both.paste(outlined(picture, mask))
    both.paste(mask.convert("RGB"), (picture.width, 0))
    share = f"{made.picture.name}: {100 * made.share:.1f} % counts"
    return Tile(both, share if made.new else f"{share}, was there")


def outlined(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture, dark where its mask is, and with a line around what counts more than half."""
    counts = np.asarray(mask, dtype=np.float64)[..., None] / 255
    shown = np.asarray(picture, dtype=np.float64) * (DIM + (1 - DIM) * counts)
    half = np.where(np.asarray(mask) > 127, 255, 0).astype(np.uint8)
    shown[grown(half, 1) != grown(half, -1)] = OUTLINE
    return Image.fromarray(shown.round().astype(np.uint8))
