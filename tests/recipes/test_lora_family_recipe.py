"""Every variant of LoRA through its page: trained, written, verified, interrupted, and on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.config import read_recipe
from finetune.export import identify
from finetune.plan import plan
from recipes import dreambooth, lora

WriteRecipe = Callable[..., Path]
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "dora": {"kind": "lora", "rank": 2, "use_dora": True, "targets": "conv"},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa", "targets": "conv"},
    "lokr": {"kind": "lokr", "rank": 2, "targets": "conv"},
    "loha": {"kind": "loha", "rank": 2, "targets": "conv"},
    "oft": {"kind": "oft", "block_size": 4, "targets": "wide"},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "dora": {**NO_DROPOUT["dora"], "module_dropout": 0.3, "dropout": 0.1, "lora_plus_ratio": 4.0},
    "pissa": {**NO_DROPOUT["pissa"], "lora_plus_ratio": 4.0},
    "lora": {
        "kind": "lora",
        "rank": 2,
        "ranks": {".*attn2.*": 3},
        "rank_dropout": 0.5,
        "module_dropout": 0.3,
        "lora_plus_ratio": 4.0,
        "max_norm": 0.5,
    },
    **{name: {**NO_DROPOUT[name], "module_dropout": 0.3} for name in ("lokr", "loha", "oft")},
}
TRAIN = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "threads": 1}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name} {key}": tensor
        for file in sorted((run / "adapters").glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", DROPOUT)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Bit for bit, through the files; PiSSA's residual is made anew. The model's own prior sees the untouched base."""
    sections = {
        "adapter": {**DROPOUT[name], "text_encoder": True, "text_encoder_learning_rate": 1e-3},
        "prior": {"kind": "model"},
        "train": {**TRAIN, "ema": {"decay": 0.9}},
        "checkpoint": {"every": 2, "keep": 3},
    }
    path = write_recipe(output=str(tmp_path / "whole"), **sections)
    dreambooth.main(read_recipe(path))
    broken = write_recipe(output=str(tmp_path / "broken"), **sections)
    dreambooth.main(read_recipe(broken))
    import shutil

    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "broken" / "adapters")
    dreambooth.main(read_recipe(broken))
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][-2:] == [3, 4]
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    strip = {key.replace("broken", "whole"): tensor for key, tensor in two.items()}
    assert one and one.keys() == strip.keys()
    assert all(torch.equal(strip[key], tensor) for key, tensor in one.items())


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_a_report_is_drawn_with_the_file(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    report = {"sampler": {"steps": 1, "guidance": 1.0}, "per_prompt": 1, "prompts": ["a zib star"]}
    sections = {"adapter": NO_DROPOUT[name], "prior": {"kind": "none"}, "report": report, "recipe": "lora"}
    recipe = read_recipe(write_recipe(train={**TRAIN, "steps": 2}, **sections))
    promised = {file.removeprefix("adapters/") for file in plan(recipe).output.files if file.startswith("adapters/")}
    lora.main(recipe)
    page = (tmp_path / "run" / "report.html").read_text()
    files = sorted((tmp_path / "run" / "adapters").glob("*.safetensors"))
    assert promised == {file.name for file in files}
    assert all(identify(file).metadata["finetune.recipe"] == "lora" for file in files)
    loader = "load_lora_weights" if NO_DROPOUT[name]["kind"] == "lora" else "load_lycoris"
    assert loader in page


@pytest.mark.parametrize("layout", ["mixed", "pairwise"])
def test_prior_preservation_by_images_and_masks(layout: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    prior = {"kind": "images", "count": 3, "layout": layout, "sampler": {"steps": 1, "guidance": 1.0}}
    dreambooth.main(read_recipe(write_recipe(adapter=NO_DROPOUT["lokr"], prior=prior, train=TRAIN)))
    assert len(list((tmp_path / "run" / "adapters").glob("*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPOUT)
def test_dropouts_do_not_keep_two_processes_waiting(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A layer that one process leaves out still has a gradient there, of zero."""
    train = {**TRAIN, "batch_size": 1, "steps": 6}
    recipe = write_recipe(recipe="lora", adapter=DROPOUT[name], train=train, prior={"kind": "none"})
    page = str(Path("recipes/lora.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    done = subprocess.run([*launcher, page, "--config", str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes (DDP, gloo)" in done.stdout
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_two_processes_do_what_one_does(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sections = {"recipe": "lora", "adapter": NO_DROPOUT[name], "prior": {"kind": "none"}}
    train = {**TRAIN, "learning_rate": 1e-3}
    one = write_recipe("one.yaml", train={**train, "batch_size": 2}, output=str(tmp_path / "one"), **sections)
    two = write_recipe("two.yaml", train={**train, "batch_size": 1}, output=str(tmp_path / "two"), **sections)
    page = str(Path("recipes/lora.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    for command in ([sys.executable, page, "--config", str(one)], [*launcher, page, "--config", str(two)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)
