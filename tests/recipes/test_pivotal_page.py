"""Words and weights from a recipe to files, on one process and on two (METHODS 7, 6.3)."""

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
from finetune.export import pieces
from finetune.plan import plan
from recipes import custom_diffusion, dreambooth, pivotal

WriteRecipe = Callable[..., Path]

IMAGES = {"kind": "images", "count": 3, "sampler": {"steps": 2, "guidance": 2.0}}
WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "vectors": 2, "initializer": "star"}]}
LORA = {"kind": "lora", "rank": 2}
FULL = {"kind": "full", "select": "cross-kv", "detach_start": True}
LORA_FILES = {
    "pytorch_lora_weights.safetensors",
    "run.safetensors",
    "run.json",
    "learned_embeds.safetensors",
    "zib.safetensors",
    "zib.pt",
    "run-bundle.safetensors",
    "run-bundle.json",
}
DELTA_FILES = {"delta.safetensors", "learned_embeds.safetensors", "zib.safetensors", "zib.pt"}


@pytest.fixture
def write(write_recipe: WriteRecipe, subject: Path, tmp_path: Path) -> WriteRecipe:
    def make(name: str = "recipe.yaml", weights: dict[str, Any] = LORA, **sections: Any) -> Path:
        concept = {
            "folder": str(subject),
            "captions": "prompt",
            "prompt": "a photo of <zib> star",
            "class_prompt": "a photo of a star",
            "trigger": "<zib>",
        }
        data = {"resolution": 16, "concepts": [concept], "cache": {"folder": str(tmp_path / "cache")}}
        train = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "threads": 1}
        section = {"kind": "pivotal", "embedding": WORDS, "weights": weights, **sections.pop("adapter", {})}
        kind = "custom_diffusion" if weights["kind"] == "full" else "pivotal"
        whole = {"recipe": kind, "adapter": section, "data": data, "train": train, "prior": IMAGES}
        return write_recipe(name, **(whole | sections))

    return make


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("prior", [IMAGES, IMAGES | {"layout": "mixed"}, {"kind": "model"}, {"kind": "none"}])
@pytest.mark.parametrize("mode", ["concurrent", "two-phase"])
def test_a_word_and_a_lora_learn_under_every_prior_and_their_files_verify(
    mode: str, prior: dict[str, Any], write: WriteRecipe, tmp_path: Path
) -> None:
    recipe = read_recipe(write(adapter={"mode": mode}, prior=prior))
    pivotal.main(recipe)  # finish() raises where a written file is not what was trained
    assert len(losses(tmp_path / "run")) == 4
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == LORA_FILES


def test_a_delta_is_written_and_the_plan_says_so(write: WriteRecipe, tmp_path: Path) -> None:
    recipe = read_recipe(write(weights=FULL, adapter={"pivot": 1.0}, prior={"kind": "model"}))
    told = {Path(name).name for name in plan(recipe).output.files if name.startswith("adapters/")}
    custom_diffusion.main(recipe)
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == DELTA_FILES == told


def test_the_plan_names_every_file_of_words_and_a_lora(write: WriteRecipe) -> None:
    found = plan(read_recipe(write()))
    told = {Path(name).name for name in found.output.files if name.startswith("adapters/")}
    assert told == {name for name in LORA_FILES if not name.endswith(".json")}
    assert found.trainable["embedding"] == 2 * 16


def test_masks_average_previews_and_a_report(write: WriteRecipe, tmp_path: Path, subject: Path) -> None:
    """With all that other methods have: dreambooth's page, masks, a moving average, pictures on the way, a report."""
    sampler = {"steps": 2, "guidance": 2.0}
    sections = {
        "recipe": "dreambooth",
        "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "threads": 1, "ema": {"decay": 0.5}},
        "samples": {"every": 2, "prompts": ["a <zib> star"], "sampler": sampler},
        "report": {"prompts": ["a <zib> star at night"], "per_prompt": 1, "sampler": sampler},
    }
    masks = f"data.concepts.0.masks={subject / 'masks'}"
    dreambooth.main(read_recipe(write(weights=LORA | {"text_encoder": True}, **sections), [masks]))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "load_lora_weights" in page and "load_textual_inversion" in page
    assert (tmp_path / "run" / "samples" / "step-000004" / "0-0.png").is_file()
    assert [one.kind for one in pieces(tmp_path / "run")] == ["lora", "embedding"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["concurrent", "two-phase"])
def test_two_processes_do_what_one_does_before_and_after_the_pivot(
    mode: str, write: WriteRecipe, tmp_path: Path
) -> None:
    """From the pivot on, weights without a part in the loss must not make a process wait for another."""
    # with plain gradients differences stay as small as rounding makes them; Adam turns the least into a step
    train = {"steps": 6, "learning_rate": 0.1, "threads": 1, "optimizer": {"name": "sgd"}}
    sections: dict[str, Any] = {"adapter": {"mode": mode}, "prior": {"kind": "none"}}
    one = write("one.yaml", **sections, train={**train, "batch_size": 2}, output=str(tmp_path / "one" / "run"))
    two = write("two.yaml", **sections, train={**train, "batch_size": 1}, output=str(tmp_path / "two" / "run"))
    page = str(Path("recipes/pivotal.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    for command in ([sys.executable, page, "--config", str(one)], [*launcher, page, "--config", str(two)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes (DDP, gloo)" in done.stdout
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(tmp_path / "one" / "run"), rel=1e-5)
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        first, second = (load_file(tmp_path / side / "run" / "adapters" / name) for side in ("one", "two"))
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-6, msg=key)
