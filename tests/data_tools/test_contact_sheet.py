"""The sheet shows what batches hold: the same pictures, cut, mirrored and captioned alike, in the same order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_tools import sheet, tiles
from finetune.config import Recipe, read_recipe
from finetune.data import Batches, scan
from finetune.data.encode import Latents
from finetune.errors import UserError
from finetune.families import load_family


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd: Path) -> Recipe:
    """Pictures of two shapes with masks; everything that draws can differ in is on."""
    folder, masks = tmp_path / "photos", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(32, 32), (48, 24), (24, 48), (32, 32)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 2, height))
        mask.save(masks / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zib {number}, red, green, blue", encoding="utf-8")
    concept = {"folder": str(folder), "masks": str(masks), "trigger": "zib"}
    data: dict[str, Any] = {
        "resolution": 16,
        "buckets": {"step": 8},
        "flip": True,
        "caption_dropout": 0.2,
        "wording": {"shuffle": True, "keep_tokens": 1},
        "concepts": [concept],
        "cache": {"folder": str(tmp_path / "cache")},
    }
    tree = {
        "recipe": "lora",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": data,
        "train": {"batch_size": 2, "threads": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return read_recipe(path)


def test_the_sheet_shows_the_draws_of_the_run(recipe: Recipe) -> None:
    shown = sheet.draws(recipe, 20)
    family = load_family(recipe.model)
    batches = Batches(recipe, family, scan(recipe.data), [], Latents(family, recipe.data), None)
    taken = list(itertools.islice(batches, 10))
    assert not {"denoiser", "text_encoder"} & set(family.networks)
    order = [(number, caption) for batch in taken for number, caption in zip(batch.draws, batch.captions, strict=True)]
    assert [(one.draw, one.caption) for one in shown] == order
    assert [f"0/{one.name}" for one in shown] == [name for batch in taken for name in batch.ids]
    sizes = [tuple(row[4:].tolist()) for batch in taken for row in batch.geometry]
    assert [(one.image.height, one.image.width) for one in shown] == sizes
    assert len({one.caption for one in shown}) > 4 and "" in {one.caption for one in shown}
    for one, batch, row in ((shown[2 * i + j], taken[i], j) for i in range(10) for j in range(2)):
        assert batch.mask is not None
        cells = batch.mask[row, 0, : one.image.height // family.latent_scale, : one.image.width // family.latent_scale]
        left, right = cells[:, 0].mean(), cells[:, -1].mean()  # which half counts tells whether the draw is mirrored
        values = torch.from_numpy(np.array(one.image)).float()
        half = one.image.width // 2
        assert (values[:, :half].mean() > values[:, half:].mean()) == bool(left > right)


def test_as_a_page_and_as_a_picture(recipe: Recipe, tmp_path: Path) -> None:
    shown = sheet.draws(recipe, 7)
    text = sheet.write(tmp_path / "sheet.html", shown, "my recipe").read_text(encoding="utf-8")
    assert text.count("<figure>") == 7 and "my recipe" in text and all(one.caption in text for one in shown)
    drawn = Image.open(sheet.write(tmp_path / "sheet.png", shown, "my recipe"))
    assert drawn.width > 6 * tiles.TILE and drawn.height > 2 * tiles.TILE
    with pytest.raises(UserError, match=r"must end with .html or .png"):
        sheet.write(tmp_path / "sheet.gif", shown, "my recipe")
