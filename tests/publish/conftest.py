"""A run that has ended, with previews, a cache and checkpoints, as it lies on a disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.config import read_recipe
from recipes import dreambooth


@pytest.fixture(scope="session")
def ended(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run, for reading only; its pictures lie in ``pictures`` beside it."""
    folder = tmp_path_factory.mktemp("publish")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (200, 90 * number, 30)).save(pictures / f"{number}.png")
    concept = {"folder": str(pictures), "prompt": "a photo of zib star", "trigger": "zib"}
    sampler = {"steps": 1, "guidance": 1.0}
    recipe = {
        "recipe": "dreambooth",
        "output": str(folder / "zib"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(folder / "zib" / "cache")}},
        "train": {"steps": 2, "batch_size": 1, "learning_rate": 1e-2, "threads": 1},
        "checkpoint": {"every": 1},
        "samples": {"every": 1, "per_prompt": 2, "sampler": sampler},
        "report": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    dreambooth.main(read_recipe(path))
    return folder / "zib"


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the run, to spoil."""
    return lambda: shutil.copytree(ended, tmp_path / "zib")
