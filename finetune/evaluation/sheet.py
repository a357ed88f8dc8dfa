"""``before-after.png``: a run on one picture, to show around."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from finetune.files import replacing

if TYPE_CHECKING:
    from finetune.evaluation.report import ReportData

TILE, GAP, MARGIN, LABELS = 128, 8, 24, 96  # pixels
COLUMNS = 6
INK, FAINT, PAPER = (28, 30, 36), (110, 114, 124), (255, 255, 255)

Row = tuple[str, Sequence[Image.Image], Sequence[str]]


def write_sheet(path: Path, data: ReportData) -> Path:
    """What was taught, the subject in new scenes and the bare class, each before and after, as a PNG."""
    rows: list[Row] = [("taught", [one.image for one in data.subject], [])]
    if data.scenes:
        prompts = [shot.prompt for shot in data.scenes]
        rows += [("before", [shot.before[0] for shot in data.scenes], [])]
        rows += [("after", [shot.after[0] for shot in data.scenes], prompts)]
    if data.of_class:
        name = [data.of_class.prompt]
        rows += [("before", data.of_class.before, []), ("after", data.of_class.after, name * COLUMNS)]
    with replacing(path) as temporary:
        _draw(rows).save(temporary, format="PNG", optimize=True)
    return path


def _draw(rows: Sequence[Row]) -> Image.Image:
    heights = [TILE + GAP + (44 if captions else 0) for _, _, captions in rows]
    width = 2 * MARGIN + LABELS + COLUMNS * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) - GAP), PAPER)
    canvas, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(12)
    top = MARGIN
    for (label, images, captions), height in zip(rows, heights, strict=True):
        canvas.text((MARGIN, top + TILE // 2), label, INK, font, anchor="lm")
        for column, image in enumerate(images[:COLUMNS]):
            left = MARGIN + LABELS + column * (TILE + GAP)
            sheet.paste(_tile(image), (left, top))
            if captions:
                text = "\n".join(textwrap.wrap(captions[column], 22)[:3])
                canvas.multiline_text((left, top + TILE + 4), text, FAINT, small, spacing=1)
        top += height
    return sheet


def _tile(image: Image.Image) -> Image.Image:
    """A square of the sheet: small pictures enlarged in whole pixels, large ones made smaller."""
    small = max(image.size) < TILE
    return image.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
