"""What a model sees in the first draws of a run: pictures as they are cut and mirrored, masks, captions as worded.

Order, captions, crops and mirroring are asked of the batches of the run itself. No weights are loaded.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.caches import require_draws
from finetune.config import Recipe
from finetune.config.adapters import new_words
from finetune.data import images, sources
from finetune.data.batches import Batches
from finetune.data.encode import Latents
from finetune.data.entries import Entry
from finetune.data.preparation import check_resolution
from finetune.data.prior import foreseen
from finetune.errors import UserError
from finetune.evaluation.markup import Markup, document, join, picture, tag
from finetune.families import load_family
from finetune.files import replacing, write_text

TILE, GAP, COLUMNS = 192, 16, 6  # pixels
WORDS = 60  # pixels for the caption
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
            image = _seen(entry, batches.flipped(one), family.latent_scale, recipe.data.unmasked_weight)
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
    if path.suffix == ".html":
        write_text(path, page(shown, title))
    elif path.suffix == ".png":
        with replacing(path) as temporary:
            drawn(shown).save(temporary, format="PNG", optimize=True)
    else:
        raise UserError(f"--out {path}: must end with .html or .png")
    return path


def page(shown: Sequence[Shown], title: str) -> str:
    """The sheet as HTML."""
    figures = [
        tag(
            "figure",
            picture(one.image, f"{one.name}, {one.image.width} x {one.image.height}"),
            tag("figcaption", _label(one), tag("div", one.caption or "(no caption)")),
        )
        for one in shown
    ]
    lead = "The first draws of the run, in its order: as they are cut and mirrored, with the captions that are read."
    header = tag(
        "header", tag("p", "what the model sees", class_="kind"), tag("h1", title), tag("p", lead, class_="lead")
    )
    whole = "<style>.gallery img { aspect-ratio: auto; object-fit: contain; }</style>"
    return document(title, header, join([Markup(whole), tag("div", *figures, class_="gallery")]))


def drawn(shown: Sequence[Shown]) -> Image.Image:
    """The sheet as a picture."""
    rows = -(-len(shown) // COLUMNS)
    wide, high = TILE + GAP, TILE + GAP + WORDS
    sheet = Image.new("RGB", (COLUMNS * wide + GAP, rows * high + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, one in enumerate(shown):
        left, top = GAP + index % COLUMNS * wide, GAP + index // COLUMNS * high
        tile = one.image.copy()
        factor = TILE / max(tile.size)
        size = [max(1, round(side * factor)) for side in tile.size]
        tile = tile.resize((size[0], size[1]), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        lines = [_label(one), *textwrap.wrap(one.caption or "(no caption)", 30)[:3]]
        canvas.multiline_text((left, top + TILE + 4), "\n".join(lines), "black", font, spacing=1)
    return sheet


def _label(one: Shown) -> str:
    return f"step {one.step}, {one.name}, {one.image.width} x {one.image.height}"
