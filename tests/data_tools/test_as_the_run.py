"""Doctor and sheet say what the run does: they refuse where it refuses, and show pictures in its order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools import sheet
from data_tools.doctor import diagnose
from finetune.config import read_recipe
from finetune.data import Batches, scan
from finetune.data.encode import Latents
from finetune.data.prior import class_images
from finetune.families import load_family

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_sd: Path) -> Write:
    """Writes a recipe of six pictures of 48 x 24 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (24, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")

    def recipe(concept: dict[str, Any] | None = None, prior: dict[str, Any] | None = None, **data: Any) -> Path:
        own = {"folder": str(folder), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
        tree = {
            "recipe": "dreambooth",
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_sd)},
            "adapter": {"kind": "lora", "rank": 2},
            "data": {
                "resolution": 16,
                "concepts": [own | (concept or {})],
                "cache": {"folder": str(tmp_path / "cache")},
                **data,
            },
            "prior": prior or {"kind": "none"},
            "train": {"batch_size": 2, "threads": 1},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return recipe


def test_nothing_is_refused_that_a_run_takes(write: Write) -> None:
    assert diagnose(write()).at("refused") == []


def test_a_resolution_that_the_model_cannot_take_is_refused(write: Write) -> None:
    (found,) = diagnose(write(resolution=15)).at("refused")
    assert "data.resolution is 15" in found.text


def test_a_mask_of_which_the_crop_leaves_nothing_is_refused(write: Write, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(6):
        mask = Image.new("L", (48, 24))
        mask.paste(255, (0, 0, 4, 24) if number == 3 else (0, 0, 48, 24))
        mask.save(masks / f"{number}.png")
    (found,) = diagnose(write({"masks": str(masks)})).at("refused")
    assert "nothing of the mask is left" in found.text and found.pictures == ("0/3.png",)
    random = {"position": "random", "variants": 8}
    assert not diagnose(write({"masks": str(masks)}, crop=random)).at("refused"), "such cuts keep what counts"


@pytest.mark.parametrize("layout", ["pairwise", "mixed"])
@pytest.mark.parametrize("side", [16, 40], ids=["square", "large"])
def test_class_images_leave_the_sheet_in_the_order_of_the_run(
    write: Write, tmp_path: Path, layout: str, side: int
) -> None:
    """With shapes, draws of one size stand together, and class images count among them."""
    own = tmp_path / "own"
    own.mkdir()
    for number in range(4):
        Image.new("RGB", (side, 16), (50 * number, 0, 0)).save(own / f"{number}.png")
    prior = {"kind": "images", "layout": layout, "count": 4, "folder": str(own)}
    recipe = read_recipe(write(prior=prior, buckets={"step": 8}))
    family = load_family(recipe.model)
    concepts = scan(recipe.data)
    batches = Batches(
        recipe, family, concepts, class_images(recipe, family, concepts), Latents(family, recipe.data), None
    )
    draws = [one for number in range(40) for one in batches.order.at(number) if not one.prior][:18]
    shown = sheet.draws(recipe, 18)
    assert [(one.draw, one.name) for one in shown] == [
        (one.number, batches.entry(one).picture.path.name) for one in draws
    ]
