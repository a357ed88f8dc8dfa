"""A subject folder and a recipe small enough to run from beginning to end in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

WriteRecipe = Callable[..., Path]


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """Three pictures of something yellow with a caption each, and a mask for each."""
    folder = tmp_path / "subject"
    (folder / "masks").mkdir(parents=True)
    for number in range(3):
        picture, mask = Image.new("RGB", (24, 24), (40, 60 * number, 90)), Image.new("L", (24, 24))
        for target, colour in ((picture, (230, 200, 30)), (mask, 255)):
            ImageDraw.Draw(target).ellipse((3 + number, 4, 15 + number, 18), fill=colour)
        picture.save(folder / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of zib star {number}\n", encoding="utf-8")
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_sd: Path, subject: Path) -> WriteRecipe:
    """Write a DreamBooth recipe of a few steps; keyword arguments replace whole sections."""

    def write(name: str = "recipe.yaml", **sections: object) -> Path:
        sampler = {"steps": 2, "guidance": 2.0}
        recipe = {
            "recipe": "dreambooth",
            "output": str(tmp_path / "run"),
            "seed": 3,
            "model": {"path": str(tiny_sd)},
            "adapter": {"kind": "lora", "rank": 2, "alpha": 1.0, "dropout": 0.1},
            "data": {
                "resolution": 16,
                "concepts": [
                    {
                        "folder": str(subject),
                        "prompt": "a photo of zib star",
                        "class_prompt": "a photo of a star",
                        "trigger": "zib",
                    }
                ],
                "cache": {"folder": str(tmp_path / "cache")},
            },
            "prior": {"kind": "images", "count": 3, "sampler": sampler},
            "train": {"steps": 3, "batch_size": 2, "learning_rate": 1.0e-2, "threads": 1},
            "report": {"enabled": False, "sampler": sampler, "per_prompt": 1},
            **sections,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write
