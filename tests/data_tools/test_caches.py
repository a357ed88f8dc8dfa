"""What is made beforehand is what a run would have made, and a run then makes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_tools import caches
from finetune.cli import app
from finetune.config import Recipe, read_recipe
from finetune.data import prepare
from finetune.errors import UserError
from finetune.families import load_family

Make = Callable[..., Recipe]


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_sd: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (24, 24), (80 * number, 9, 9)).save(folder / f"{number}.png")
    concept = {"folder": str(folder), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
    recipe = {
        "recipe": "dreambooth",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(tmp_path / "cache")}},
        "prior": {"kind": "images", "count": 2, "sampler": {"steps": 1}},
        "train": {"threads": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_filled_cache_leaves_nothing_to_encode(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(recipe_file)
    seen: list[set[str]] = []
    real = caches.load_family

    def watched(model: object, **options: object) -> object:
        family = real(model, **options)  # type: ignore[arg-type]
        encode = family.encode_image

        def encoding(pixels: object) -> object:
            seen.append(set(family.networks))
            return encode(pixels)  # type: ignore[arg-type]

        family.encode_image = encoding  # type: ignore[method-assign, assignment]
        return family

    monkeypatch.setattr(caches, "load_family", watched)
    made = caches.fill(recipe)
    assert (made["latents_made"], made["prompts_made"], made["class_images"]) == (5, 2, 2)
    assert seen and all(networks == {"vae"} for networks in seen), "something else was in memory meanwhile"
    family = load_family(recipe.model)
    found = prepare(recipe, family).describe()
    assert (found["latents_made"], found["prompts_made"]) == (0, 0)
    assert set(family.networks) == {"denoiser"}


def test_the_commands_say_what_they_made(recipe_file: Path) -> None:
    runner = CliRunner()
    drawn = runner.invoke(app, ["data", "class-images", str(recipe_file)])
    assert drawn.exit_code == 0 and drawn.output.strip().endswith(": 2 class images")
    folder = Path(drawn.output.strip().splitlines()[-1].rpartition(": ")[0])
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(before) == 2
    first = runner.invoke(app, ["data", "cache", str(recipe_file)])
    assert "latents: 5 made, 0 were there" in first.output and "prompts: 2 made" in first.output
    again = runner.invoke(app, ["data", "cache", str(recipe_file)])
    assert "latents: 0 made, 5 were there" in again.output
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


def test_what_no_run_has_used_for_long_is_removed_when_asked(recipe_file: Path) -> None:
    runner = CliRunner()
    cache = recipe_file.parent / "cache"
    runner.invoke(app, ["data", "cache", str(recipe_file)])
    runner.invoke(app, ["data", "cache", str(recipe_file), "data.resolution=32"])
    packs = sorted((cache / "latents").glob("pack-*"))
    for path in (*packs, *(cache / "prompts").glob("pack-*")):
        os.utime(path, (0, time.time() - 40 * 86400))
    said = runner.invoke(app, ["data", "cache", str(recipe_file), "--prune", "30"])
    assert "latents: 0 made, 5 were there; 2 packs" in said.output
    assert "1 files removed that no run has used for 30 days" in said.output
    assert sorted((cache / "latents").glob("pack-*")) == packs[:1], "the other resolution's pack is gone"
    again = runner.invoke(app, ["data", "cache", str(recipe_file), "--prune", "30"])
    assert "latents: 0 made, 5 were there; 1 pack," in again.output and "0 files removed" in again.output


def test_what_makes_no_sense_is_refused(recipe_file: Path) -> None:
    with pytest.raises(UserError, match="nothing to fill"):
        caches.fill(read_recipe(recipe_file, ["data.cache.latents=false", "data.cache.text=false"]))
    with pytest.raises(UserError, match="class images belong to 'images'"):
        caches.draw_class_images(read_recipe(recipe_file, ["prior={kind: model}"]))


@pytest.mark.parametrize("verb", ["cache", "sheet"])
def test_a_recipe_that_takes_no_steps_has_nothing_to_show_or_to_fill(verb: str) -> None:
    found = CliRunner().invoke(app, ["data", verb, "recipes/configs/aesthetic-tiny.yaml"])
    assert found.exit_code != 0 and "averages whole pictures" in str(found.exception)
