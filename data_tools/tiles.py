"""Pictures with a few words each, side by side: as a page or as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finetune.errors import UserError
from finetune.evaluation.markup import Markup, document, join, picture, tag
from finetune.files import replacing, write_text

TILE, GAP = 192, 16  # pixels
ACROSS = 6 * TILE  # pixels of a picture's rows, gaps aside
WORDS = 60  # pixels for the words


@dataclass(frozen=True)
class Tile:
    """One picture.

    Attributes:
        label: what it is, in a line.
        text: what belongs to it, in a paragraph.
    """

    image: Image.Image
    label: str
    text: str = ""


@dataclass(frozen=True)
class Heading:
    """What stands above the tiles of a page: its kind, such as "what the model sees", title and a sentence."""

    kind: str
    title: str
    lead: str


def write(path: Path, tiles: Sequence[Tile], heading: Heading, width: int = TILE) -> Path:
    """Write tiles as a page (``.html``) or as a picture (``.png``), which has no heading.

    Args:
        width: of a tile, in pixels.

    Raises:
        UserError: another ending.
    """
    check(path)
    if path.suffix == ".html":
        write_text(path, page(tiles, heading, width))
    else:
        with replacing(path) as temporary:
            drawn(tiles, width).save(temporary, format="PNG", optimize=True)
    return path


def check(path: Path) -> None:
    """Whether tiles can be written there.

    Raises:
        UserError: another ending.
    """
    if path.suffix not in (".html", ".png"):
        raise UserError(f"{path}: must end with .html or .png")


def page(tiles: Sequence[Tile], heading: Heading, width: int = TILE) -> str:
    """Tiles as HTML."""
    figures = [
        tag(
            "figure",
            picture(one.image, one.label),
            tag("figcaption", one.label, tag("div", one.text) if one.text else None),
        )
        for one in tiles
    ]
    header = tag(
        "header",
        tag("p", heading.kind, class_="kind"),
        tag("h1", heading.title),
        tag("p", heading.lead, class_="lead"),
    )
    columns = f".gallery {{ grid-template-columns: repeat(auto-fill, minmax(min({width}px, 100%), 1fr)); }}"
    style = f"<style>.gallery img {{ aspect-ratio: auto; object-fit: contain; }} {columns}</style>"
    return document(heading.title, header, join([Markup(style), tag("div", *figures, class_="gallery")]))


def drawn(tiles: Sequence[Tile], width: int = TILE) -> Image.Image:
    """Tiles as a picture."""
    columns = ACROSS // width
    rows = -(-len(tiles) // columns)
    wide, high = width + GAP, TILE + GAP + WORDS
    sheet = Image.new("RGB", (columns * wide + GAP, rows * high + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, one in enumerate(tiles):
        left, top = GAP + index % columns * wide, GAP + index // columns * high
        factor = min(width / one.image.width, TILE / one.image.height)
        size = [max(1, round(side * factor)) for side in one.image.size]
        filter = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
        scaled = one.image.resize((size[0], size[1]), filter)
        sheet.paste(scaled, (left + (width - scaled.width) // 2, top + (TILE - scaled.height) // 2))
        lines = [one.label, *textwrap.wrap(one.text, 30 * width // TILE)[:3]]
        canvas.multiline_text((left, top + TILE + 4), "\n".join(lines), "black", font, spacing=1)
    return sheet
