"""A hypernetwork from a recipe to files that A1111 and diffusers load, whatever is preserved; stopped and resumed."""

from __future__ import annotations

import json
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

import finetune
from finetune.config import read_recipe
from finetune.config.schema import SamplerConfig
from finetune.export.hypernetwork import read
from finetune.export.sample import sample
from finetune.hypernet import Hypernetwork, Structure, initialise
from finetune.plan import plan
from finetune.randomness import generator
from recipes import dreambooth, hypernetwork

WriteRecipe = Callable[..., Path]
ADAPTER = {"kind": "hypernetwork", "activation": "swish", "dropout": [0, 0.1, 0]}
SAMPLER = {"steps": 2, "guidance": 2.0}
PRIORS: dict[str, dict[str, Any]] = {
    "pairwise": {"kind": "images", "count": 3, "sampler": SAMPLER},
    "mixed": {"kind": "images", "layout": "mixed", "count": 3, "sampler": SAMPLER},
    "model": {"kind": "model"},
    "none": {"kind": "none"},
}
TRAIN: dict[str, Any] = {"steps": 40, "batch_size": 1, "threads": 1, "schedule": {"rates": "1e-2:4, 1e-3:6"}}


@pytest.fixture
def write(write_recipe: WriteRecipe) -> WriteRecipe:
    def make(name: str = "recipe.yaml", **sections: object) -> Path:
        plain = {"recipe": "hypernetwork", "adapter": ADAPTER, "prior": PRIORS["none"], "train": TRAIN}
        return write_recipe(name, **{**plain, **sections})

    return make


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("prior", PRIORS)
def test_it_learns_under_every_prior_and_its_files_verify(prior: str, write: WriteRecipe, tmp_path: Path) -> None:
    """``finish`` raises where a written file is not what was trained; the rates end the run."""
    hypernetwork.main(read_recipe(write(prior=PRIORS[prior])))
    logged = rows(tmp_path / "run")
    assert [row["learning_rate_hypernetwork"] for row in logged] == pytest.approx([1e-2] * 4 + [1e-3] * 2)
    assert all(("loss_prior" in row) == (prior != "none") for row in logged)
    written = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    assert written == {"run.safetensors", "run.pt"}
    assert read(tmp_path / "run" / "adapters" / "run.pt").settings()["step"] == 6


def test_the_model_s_own_prior_is_the_untouched_model(write: WriteRecipe, tmp_path: Path) -> None:
    """At the untouched model there is nothing to preserve; from the first step on there is."""
    adapter = {"kind": "hypernetwork", "zero_last": True}
    hypernetwork.main(read_recipe(write(prior=PRIORS["model"], adapter=adapter)))
    first, *_, last = rows(tmp_path / "run")
    assert first["loss_prior"] == 0.0 < last["loss_prior"]


def test_dreambooth_trains_one_as_well(write: WriteRecipe, tmp_path: Path, subject: Path) -> None:
    """With masks, an average and previews: the extra network disturbs none of them."""
    train = {**TRAIN, "ema": {"decay": 0.9}, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    samples = {"every": 3, "prompts": ["a star"], "sampler": SAMPLER}
    recipe = write(recipe="dreambooth", prior=PRIORS["pairwise"], train=train, samples=samples)
    dreambooth.main(read_recipe(recipe, [f"data.concepts.0.masks={subject / 'masks'}"]))
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {"step-000003", "step-000006"}
    averaged = read(tmp_path / "run" / "adapters" / "run.safetensors")
    begun = initialise(Hypernetwork(Structure(activation="swish", dropout=(0, 0.1, 0)), [16]), "normal", 3)
    moved = {name: averaged.tensors[name] - value for name, value in begun.state_dict().items()}
    assert all(bool(change.any()) for change in moved.values())


def test_diffusers_draws_with_it_what_finetune_sample_does(write: WriteRecipe, tmp_path: Path, tiny_sd: Path) -> None:
    hypernetwork.main(read_recipe(write()))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    finetune.load_hypernetwork(pipeline, tmp_path / "run" / "adapters" / "run.pt")
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator(0, "sample", 0, 0)}
    drawn = pipeline("a photo of zib star", **settings).images[0]
    (expected,) = sample(tmp_path / "run", ["a photo of zib star"], sampler=SamplerConfig(**SAMPLER))
    (base,) = sample(tmp_path / "run", ["a photo of zib star"], sampler=SamplerConfig(**SAMPLER), strength=0.0)
    assert drawn.tobytes() == expected.tobytes() != base.tobytes()


def test_its_plan_names_its_files_and_counts_it(write: WriteRecipe) -> None:
    made = plan(read_recipe(write(adapter={"kind": "hypernetwork"})))
    assert made.trainable == {"hypernetwork": 2 * (16 * 32 + 32 + 32 * 16 + 16)}
    assert made.arithmetic is not None and made.arithmetic.steps == 6
    assert {"adapters/run.safetensors", "adapters/run.pt"} <= set(made.output.files)


@pytest.mark.slow
def test_report_shows_it(write: WriteRecipe, tmp_path: Path) -> None:
    report = {"prompts": ["a photo of zib star at night"], "per_prompt": 1, "sampler": SAMPLER}
    hypernetwork.main(read_recipe(write(report=report)))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "load_hypernetwork" in page


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "recipes.hypernetwork", "--config", str(recipe)]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bytes(write: WriteRecipe, tmp_path: Path) -> None:
    """Dropout, an average, accumulation, and rates that change after the checkpoint it resumes from."""
    changes = {
        "train": {
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "threads": 1,
            "ema": {"decay": 0.9},
            "schedule": {"rates": "1e-2:20, 1e-3:40"},
            "max_grad_value": 0.1,
        },
        "checkpoint": {"every": 3},
    }
    whole = write("whole.yaml", **changes, output=str(tmp_path / "whole" / "star"))
    killed = write("killed.yaml", **changes, output=str(tmp_path / "killed" / "star"))
    subprocess.run(command(whole), check=True, capture_output=True)
    run = tmp_path / "killed" / "star"
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(rows_so_far(run)) < 16):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "adapters" / "star.pt").exists()
    subprocess.run(command(killed), check=True, capture_output=True)
    for name in ("star.safetensors", "star.pt"):
        first, second = (tmp_path / side / "star" / "adapters" / name for side in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()
    assert [row["step"] for row in rows(run)] == list(range(1, 41))


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_two_processes_do_what_one_does(write: WriteRecipe, tmp_path: Path) -> None:
    adapter = {"kind": "hypernetwork", "activation": "swish"}  # dropout differs between processes by design
    one = write("one.yaml", adapter=adapter, train={**TRAIN, "batch_size": 2}, output=str(tmp_path / "one" / "star"))
    two = write("two.yaml", adapter=adapter, train=TRAIN, output=str(tmp_path / "two" / "star"))
    page = str(Path("recipes/hypernetwork.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    for started in ([sys.executable, page, "--config", str(one)], [*launcher, page, "--config", str(two)]):
        done = subprocess.run(started, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = (read(tmp_path / side / "star" / "adapters" / "star.pt").tensors for side in ("one", "two"))
    idle = "16.k.linear.2.bias"  # moves all keys alike, which softmax does not see: its gradient is rounding alone
    for name, tensor in first.items():
        if name == idle:
            continue
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
