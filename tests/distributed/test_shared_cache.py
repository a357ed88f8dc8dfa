"""Two real processes build one cache: each entry is made once, by one of them, and both read all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from launching import PROFILES, ROOT, together
from PIL import Image

from finetune.config import read_recipe
from finetune.data import prepare
from finetune.families import load_family


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd: Path) -> Path:
    """Five pictures, mirrored too, two of which are the same file, with captions of their own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (24, 24), (80 * (number % 4), 9, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zib number {number}", encoding="utf-8")
    concept = {"folder": str(folder), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
    cache = {"folder": str(tmp_path / "cache")}
    recipe = {
        "recipe": "dreambooth",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "flip": True, "concepts": [concept], "cache": cache},
        "train": {"threads": 1, "device": "cpu"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def launched(program: Path, *arguments: str) -> str:
    """What two processes print."""
    code, said = together(["--config_file", str(PROFILES / "cpu-2.yaml")], program, *arguments)
    assert code == 0, said
    return said


def test_two_processes_make_each_entry_once_and_both_read_all(recipe: Path, tmp_path: Path) -> None:
    """First the command, then a run that finds all of it; against what one process alone makes."""
    said = launched(ROOT / "finetune" / "__main__.py", "data", "cache", str(recipe))
    assert "latents: 8 made, 0 were there; 2 packs" in said, "four pictures and their mirrors, each process some"
    assert "prompts: 5 made, 0 were there; 2 packs" in said
    assert said.count("latents:") == 1, "one of the processes speaks"
    launched(Path(__file__).with_name("cache_run.py"), str(recipe), str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank {rank}.json").read_text()) for rank in (0, 1)]
    assert all(rank["made"] == [0, 0] and rank["networks"] == ["denoiser"] for rank in ranks), "no encoder was needed"
    alone = read_recipe(recipe, [f"data.cache.folder={tmp_path / 'alone'}", "train.batch_size=2"])
    whole = prepare(alone, load_family(alone.model))
    for step, batch in enumerate(itertools.islice(whole, 10)):
        both = [sums for rank in ranks for sums in rank["sums"][step]]
        assert sorted(both) == sorted(batch.posterior.mean.double().sum((1, 2, 3)).tolist())
