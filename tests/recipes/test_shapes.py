"""A real family trains on pictures of several shapes, with tags shuffled; every way to run gives the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.config import read_recipe
from recipes import dreambooth

WriteRecipe = Callable[..., Path]
LORA = Path("adapters") / "pytorch_lora_weights.safetensors"
SHAPES = [(32, 32), (48, 24), (24, 48), (40, 24), (32, 32)]


@pytest.fixture
def shapes(tmp_path: Path) -> dict[str, Any]:
    """The data of a run: five pictures of three shapes, each with tags and a mask."""
    folder = tmp_path / "shapes"
    (folder / "masks").mkdir(parents=True)
    for number, size in enumerate(SHAPES):
        Image.new("RGB", size, (40, 50 * number, 90)).save(folder / f"{number}.png")
        Image.new("L", size, 255).save(folder / "masks" / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zib star, red, blue, number {number}", encoding="utf-8")
    concept = {"folder": str(folder), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
    return {
        "resolution": 16,
        "more_resolutions": [32],
        "buckets": {"step": 8},
        "flip": True,
        "caption_dropout": 0.2,
        "wording": {"shuffle": True, "keep_tokens": 1, "tag_dropout": 0.3},
        "concepts": [concept | {"masks": str(folder / "masks")}],
        "cache": {"folder": str(tmp_path / "cache")},
    }


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("kind", ["pairwise", "mixed", "model"])
def test_cached_uncached_and_continued_runs_are_one(
    kind: str, shapes: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """METHODS 9.7: equal losses with latents and prompts cached or not, with flips, dropout and shuffling on."""
    sampler = {"steps": 1}
    prior = {"kind": "images", "count": 4, "layout": kind, "sampler": sampler} if kind != "model" else {"kind": kind}
    recipe = write_recipe(data=shapes, prior=prior)

    def run(name: str, *changes: str) -> Path:
        dreambooth.main(read_recipe(recipe, [f"output={tmp_path / name}", *changes]))
        return tmp_path / name

    whole = run("whole", "train.steps=8")
    again = run("again", "train.steps=8", "data.cache.latents=false", "data.cache.text=false")
    run("parts", "train.steps=3")
    parts = run("parts", "train.steps=8")
    assert len(losses(whole)) == 8 and losses(whole) == losses(again)
    assert (whole / LORA).read_bytes() == (parts / LORA).read_bytes()
