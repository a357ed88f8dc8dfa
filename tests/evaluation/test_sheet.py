"""The one picture of a run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.evaluation import Captioned, ReportData, Shot, write_sheet
from finetune.evaluation.sheet import GAP, LABELS, MARGIN, TILE

RED, BLUE, GREEN = (200, 0, 0), (0, 0, 200), (0, 160, 0)


def plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def test_rows_are_taught_before_after_and_tiles_keep_their_colours(tmp_path: Path) -> None:
    shot = Shot("a zib star on grass", [plain(BLUE)], [plain(GREEN)])
    data = ReportData(title="star", subject=[Captioned(plain(RED), "a zib star")], scenes=[shot])
    with Image.open(write_sheet(tmp_path / "sheet.png", data)) as sheet:
        left = MARGIN + LABELS + TILE // 2
        middles = [sheet.getpixel((left, MARGIN + row * (TILE + GAP) + TILE // 2)) for row in range(3)]
    assert middles == [RED, BLUE, GREEN]


def test_a_run_without_scenes_or_class_still_has_a_sheet(tmp_path: Path) -> None:
    data = ReportData(title="star", subject=[Captioned(plain(RED), "a star")])
    assert write_sheet(tmp_path / "sheet.png", data).is_file()
