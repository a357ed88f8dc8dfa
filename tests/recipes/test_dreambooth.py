"""DreamBooth from a recipe to files that other tools load, whatever trains and whatever is preserved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import ImageChops
from safetensors.torch import load_file

from finetune.config import read_recipe
from finetune.config.schema import SamplerConfig
from finetune.export.sample import sample
from finetune.randomness import generator
from recipes import dreambooth

WriteRecipe = Callable[..., Path]

PRIORS: dict[str, dict[str, Any]] = {
    "pairwise": {"kind": "images", "count": 3, "sampler": {"steps": 2, "guidance": 2.0}},
    "mixed": {"kind": "images", "layout": "mixed", "count": 3, "sampler": {"steps": 2, "guidance": 2.0}},
    "model": {"kind": "model"},
    "none": {"kind": "none"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "lora with text encoder": {"kind": "lora", "rank": 2, "text_encoder": True, "text_encoder_learning_rate": 1e-3},
    "full": {"kind": "full", "select": "cross-attention"},
}


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_learns_under_every_prior_and_its_files_verify(
    adapter: str, prior: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(adapter=ADAPTERS[adapter], prior=PRIORS[prior])
    dreambooth.main(read_recipe(recipe))  # finish() raises where a written file is not what was trained
    logged = losses(tmp_path / "run")
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert all(("loss_prior" in row) == (prior != "none") for row in logged)
    written = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    assert written == (
        {"delta.safetensors"}
        if adapter == "full"
        else {"pytorch_lora_weights.safetensors", "run.safetensors", "run.json"}
    )


def test_prior_by_the_model_itself_starts_at_zero(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(prior=PRIORS["model"], adapter={"kind": "lora", "rank": 2})
    dreambooth.main(read_recipe(recipe))
    first, *_, last = losses(tmp_path / "run")
    assert first["loss_prior"] == 0.0  # nothing has moved yet
    assert last["loss_prior"] > 0.0


def test_masks_change_what_is_learned(write_recipe: WriteRecipe, tmp_path: Path, subject: Path) -> None:
    recipe = write_recipe(prior=PRIORS["pairwise"])
    masks = [f"output={tmp_path / 'masked'}", f"data.concepts.0.masks={subject / 'masks'}"]
    dreambooth.main(read_recipe(recipe))
    dreambooth.main(read_recipe(recipe, masks))
    plain, masked = (losses(tmp_path / name)[0] for name in ("run", "masked"))
    assert plain["loss_instance"] != masked["loss_instance"]
    assert plain["loss_prior"] == masked["loss_prior"]  # class images are never masked


def test_sample_is_what_diffusers_draws_bit_for_bit(write_recipe: WriteRecipe, tmp_path: Path, tiny_sd: Path) -> None:
    dreambooth.main(read_recipe(write_recipe()))
    file = tmp_path / "run" / "adapters" / "pytorch_lora_weights.safetensors"
    prompt, sampler = "a photo of zib star on grass", SamplerConfig(steps=3, guidance=3.0)
    ours = sample(file, [prompt], seed=7, sampler=sampler)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
    base = pipeline(prompt, generator=generator(7, "sample", 0, 0), **settings).images[0]
    pipeline.load_lora_weights(file)
    theirs = pipeline(prompt, generator=generator(7, "sample", 0, 0), **settings).images[0]
    assert ImageChops.difference(ours, theirs).getbbox() is None
    assert ImageChops.difference(ours, base).getbbox() is not None


def test_report_shows_before_and_after(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    report = {"prompts": ["a photo of zib star at night"], "per_prompt": 1, "sampler": {"steps": 2, "guidance": 2.0}}
    dreambooth.main(read_recipe(write_recipe(report=report)))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "a photo of a star" in page
    assert page.count("data:image/png") >= 3 + 3 + 2 * 3  # subject, class images, three prompts before and after


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "recipes.dreambooth", "--config", str(recipe)]


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_bytes(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {
        "train": {
            "steps": 40,
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "threads": 1,
            "ema": {"decay": 0.9},
        },
        "checkpoint": {"every": 3},
    }
    whole = write_recipe("whole.yaml", **changes, output=str(tmp_path / "whole" / "star"))
    killed = write_recipe("killed.yaml", **changes, output=str(tmp_path / "killed" / "star"))
    subprocess.run(command(whole), check=True, capture_output=True)
    run = tmp_path / "killed" / "star"
    wait_for_steps = 4 + int(torch.randint(25, (1,), generator=torch.Generator().manual_seed(os.getpid())))
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(losses_so_far(run)) < wait_for_steps):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "adapters" / "star.safetensors").exists()
    subprocess.run(command(killed), check=True, capture_output=True)
    for name in ("pytorch_lora_weights.safetensors", "star.safetensors"):
        first, second = (tmp_path / side / "star" / "adapters" / name for side in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), f"after a kill at step {wait_for_steps}"
    assert [row["step"] for row in losses(run)] == list(range(1, 41))


def losses_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_text_encoder_moves_only_where_it_is_asked_to(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    dreambooth.main(read_recipe(write_recipe(adapter=ADAPTERS["lora"], prior=PRIORS["none"])))
    tensors = load_file(tmp_path / "run" / "adapters" / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"unet"}
