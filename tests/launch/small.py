"""A real recipe so small that machines that are all this one train it in seconds."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from started import started


def write_recipe(folder: Path, model: Path, steps: int) -> Path:
    """A LoRA of three pictures, one a step of each process; its run is ``folder / "run"``."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (40, 60 * number, 90)).save(pictures / f"{number}.png")
    values = {
        "recipe": "lora",
        "output": str(folder / "run"),
        "model": {"path": str(model)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {
            "resolution": 16,
            "concepts": [{"folder": str(pictures), "prompt": "a photo of zib star", "trigger": "zib"}],
            "cache": {"folder": str(folder / "cache")},
        },
        "train": {"steps": steps, "batch_size": 1, "optimizer": {"name": "adamw", "eps": 1e-4}, "threads": 1},
        "checkpoint": {"every": 3},
        "report": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(folder: Path) -> Path:
    """A folder for PATH with ``finetune`` in it, as of this tree."""
    write_program(folder / "finetune", f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m finetune "$@"\n')
    return folder


def assert_as_on_one_process(recipe: Path, run: Path, folder: Path) -> None:
    """What two processes have trained is what one trains: each step once, its loss, and the files."""
    one = folder / "one" / run.name  # which names files
    alone: list[str | Path] = [sys.executable, "-m", "finetune", "train", recipe, f"output={one}", "train.batch_size=2"]
    with started(alone, folder / "one.log") as running:
        assert running.code() == 0, running.said
    rows, expected = (
        [(row["step"], row["loss"]) for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
        for path in (run, one)
    )
    assert [step for step, _ in rows] == list(range(1, len(expected) + 1))
    assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in expected], abs=1e-6)
    files = sorted(path.relative_to(one) for path in one.glob("adapters/**/*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(run / path), load_file(one / path)
        assert all(value.allclose(theirs[name], rtol=0, atol=1e-5) for name, value in ours.items())
