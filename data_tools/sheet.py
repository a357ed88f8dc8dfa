"""What a model sees in the first draws of a run: pictures as they are cut and mirrored, masks, captions as worded.

Order, captions, crops and mirroring are asked of the batches of the run itself. No weights are loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_tools import tiles
from data_tools.caches import require_draws
from data_tools.tiles import Heading, Tile
from finetune.config import Recipe
from finetune.config.adapters import new_words
from finetune.data import images, sources
from finetune.data.batches import Batches
from finetune.data.encode import Latents
from finetune.data.entries import Entry
from finetune.data.preparation import check_resolution
from finetune.data.prior import foreseen
from finetune.families import load_family

DIM = 0.25  # how bright places are that do not count


@dataclass(frozen=True)
class Shown:
    """One draw.

    Attributes:
        image: as it is cut, mirrored where the draw is; what the mask leaves out is dimmed.
        caption: after dropout and wording.
        name: of the file.
    """

    draw: int
    step: int
    image: Image.Image
    caption: str
    name: str


def draws(recipe: Recipe, count: int) -> list[Shown]:
    """The first ``count`` draws of subject pictures, in the run's order.

    Raises:
        UserError: everything that is wrong with the pictures, or the recipe draws none.
    """
    require_draws(recipe)
    family = load_family(recipe.model)
    check_resolution(recipe, family)
    concepts = sources.scan(recipe.data, words=new_words(recipe.adapter))
    batches = Batches(recipe, family, concepts, foreseen(recipe, concepts), Latents(family, recipe.data), None)
    found: list[Shown] = []
    for number in itertools.count():
        for one in batches.order.at(number):
            if one.prior:
                continue
            entry = batches.entry(one)
            image = _seen(entry, batches.flipped(one), family.latent_scale, batches.unmasked_weight(one))
            step = number // batches.share.per_step
            found.append(Shown(number, step, image, batches.caption(one), entry.picture.path.name))
            if len(found) == count:
                return found
    raise AssertionError("the order is endless")


def _seen(entry: Entry, flipped: bool, scale: int, least: float) -> Image.Image:
    """The pixels of a draw, dark where its mask says that they do not count, cell by cell of the latents."""
    pixels = (images.pixels(entry.picture, entry.crop) + 1) / 2
    if entry.picture.mask is not None:
        counts = images.mask(entry.picture, entry.crop, scale).clamp(min=least)
        pixels *= DIM + (1 - DIM) * counts.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    if flipped:
        pixels = pixels.flip(-1)
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).contiguous().numpy())


def write(path: Path, shown: Sequence[Shown], title: str) -> Path:
    """Write a sheet as a page (``.html``) or as a picture (``.png``).

    Raises:
        UserError: another ending.
    """
    lead = "The first draws of the run, in its order: as they are cut and mirrored, with the captions that are read."
    return tiles.write(path, [_tile(one) for one in shown], Heading("what the model sees", title, lead))


def _tile(one: Shown) -> Tile:
    label = f"step {one.step}, {one.name}, {one.image.width} x {one.image.height}"
    return Tile(one.image, label, one.caption or "(no caption)")
