"""Pictures and a place for runs of every method."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import Setting
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``subject``, three squares, and ``shapes``, of three proportions."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, sizes in (("subject", [(24, 24)] * 3), ("shapes", [(48, 16), (16, 48), (32, 32)])):
        (folder / name).mkdir()
        for number, size in enumerate(sizes):
            picture = Image.new("RGB", size, (40, 60 * number, 90))
            ImageDraw.Draw(picture).ellipse((3 + number, 4, 15 + number, 18), fill=(230, 200, 30))
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path, pictures: Path) -> Setting:
    return Setting(tmp_path_factory.mktemp("runs"), tiny_sd, pictures)
