"""Two real processes build one cache: each entry is made once, by one of them, and both read all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.config import read_recipe
from finetune.data import prepare
from finetune.families import load_family

ROOT = Path(__file__).parents[2]
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]


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


def launched(*arguments: str) -> str:
    """What two processes print."""
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([*TWO, *arguments], capture_output=True, text=True, timeout=300, env=unset, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_make_each_entry_once_and_both_read_all(recipe: Path, tmp_path: Path) -> None:
    """First the command, then a run that finds all of it; against what one process alone makes."""
    said = launched("-m", "finetune", "data", "cache", str(recipe))
    assert "latents: 8 made, 0 were there; 2 packs" in said, "four pictures and their mirrors, each process some"
    assert "prompts: 5 made, 0 were there; 2 packs" in said
    assert said.count("latents:") == 1, "one of the processes speaks"
    launched(str(Path(__file__).with_name("cache_run.py")), str(recipe), str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank {rank}.json").read_text()) for rank in (0, 1)]
    assert all(rank["made"] == [0, 0] and rank["networks"] == ["denoiser"] for rank in ranks), "no encoder was needed"
    alone = read_recipe(recipe, [f"data.cache.folder={tmp_path / 'alone'}", "train.batch_size=2"])
    whole = prepare(alone, load_family(alone.model))
    for step, batch in enumerate(itertools.islice(whole, 10)):
        both = [sums for rank in ranks for sums in rank["sums"][step]]
        assert sorted(both) == sorted(batch.posterior.mean.double().sum((1, 2, 3)).tolist())
