"""Settings beside the method, and newer families, on two processes: as on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import MATRIX, drawn, losses, passes
from launching import alone, profile, together
from PIL import Image, ImageDraw
from safetensors.torch import load_file

CHECKPOINTED = {"train": {"gradient_checkpointing": True}}
CELLS: Mapping[str, dict[str, Any]] = {
    "masks": {},
    "checkpointing": CHECKPOINTED,
    "bf16": {"train": {"mixed_precision": "bf16"}},
    "int8": {"model": {"quantize": {"kind": "int8"}}},
    "nf4": {"model": {"quantize": {"kind": "nf4", "text_encoders": True}}},
    "swapped": {"model": {"block_swap": 2}, **CHECKPOINTED},
    "half base": {"model": {"dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}},
    "sd3": {},
    "flux": {},
}
LOOSE = ("bf16", "half base")  # batches of one and of two round differently
WHOLE = ("int8", "nf4", "swapped")  # what needs the base whole on every process, as FSDP2 does not leave it


def of(profile: str) -> list[str]:
    """The cells that a profile does not refuse."""
    return [name for name in CELLS if profile != "fsdp2" or name not in WHOLE]


def merged(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: merged(values.get(key, {}), more[key])
        if isinstance(more.get(key), dict)
        else more.get(key, values.get(key))
        for key in values.keys() | more.keys()
    }


@pytest.fixture(scope="module")
def write(
    tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path, twins: Callable[[str], Path]
) -> Callable[[str, int], Path]:
    """Writes all cells as runs below a folder, with so many pictures a batch."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "pictures" / "masks").mkdir(parents=True)
    for number in range(4):
        picture, mask = Image.new("RGB", (24, 24), (40, 60 * number, 90)), Image.new("L", (24, 24))
        for target, colour in ((picture, (230, 200, 30)), (mask, 255)):
            ImageDraw.Draw(target).ellipse((3 + number, 4, 15 + number, 18), fill=colour)
        picture.save(folder / "pictures" / f"{number}.png")
        mask.save(folder / "pictures" / "masks" / f"{number}.png")

    def cell(name: str, runs: Path, batch_size: int) -> dict[str, Any]:
        concept = {"folder": str(folder / "pictures"), "prompt": "a photo of zib star", "trigger": "zib"}
        if name == "masks":
            concept["masks"] = str(folder / "pictures" / "masks")
        values = {
            "recipe": "lora",
            "output": str(runs / name),
            "seed": 3,
            "model": {"path": str(twins(name) if name in ("sd3", "flux") else tiny_sd)},
            "adapter": {"kind": "lora", "rank": 2},
            "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(folder / "cache")}},
            "train": {
                "steps": 3,
                "batch_size": batch_size,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "optimizer": {"name": "adamw", "eps": 1e-4},
                "threads": 1,
            },
            "report": {"enabled": False},
        }
        return merged(values, CELLS[name])

    def written(profile: str, batch_size: int) -> Path:
        runs = folder / profile
        cells = {name: cell(name, runs, batch_size) for name in of(profile)}
        (folder / f"{profile}.json").write_text(json.dumps(cells))
        return runs

    return written


@pytest.fixture(scope="module")
def one(write: Callable[[str, int], Path]) -> Path:
    runs = write("one", 2)
    alone(MATRIX, f"{runs}.json")
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-2", "zero2", "fsdp2"])
def test_two_processes_train_as_one_does(
    name: str, one: Path, write: Callable[[str, int], Path], tmp_path: Path
) -> None:
    two = write(name, 1)
    code, said = together(profile(name, tmp_path), MATRIX, f"{two}.json")
    assert code == 0, said
    for cell in of(name):
        bound = 2e-2 if cell in LOOSE else 1e-5
        for row, again in zip(losses(one / cell), losses(two / cell), strict=True):
            assert row == pytest.approx(again, abs=bound, rel=bound), cell
        assert drawn(passes(one / cell, 1)) == drawn(passes(two / cell, 2))
        files = sorted(path.relative_to(one) for path in (one / cell).glob("adapters/**/*.safetensors"))
        assert files
        for path in files:
            ours, theirs = load_file(one / path), load_file(two / path)
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-3 if cell in LOOSE else 1e-5, msg=key)
