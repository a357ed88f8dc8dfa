"""Textual inversion from a recipe to files that other tools load (METHODS 2)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune.config import read_recipe
from finetune.errors import UserError
from finetune.train import Trainer
from recipes import dreambooth, textual_inversion

WriteRecipe = Callable[..., Path]
NAMES = ("learned_embeds.safetensors", "zib.safetensors", "zib.pt")
NONE = {"kind": "none"}


def adapter(**changes: Any) -> dict[str, Any]:
    tokens = [{"token": "<zib>", "vectors": 2, "initializer": "star"}]
    return {"kind": "embedding", "tokens": tokens, "templates": "object", **changes}


@pytest.fixture
def write(write_recipe: WriteRecipe, subject: Path, tmp_path: Path) -> WriteRecipe:
    def make(name: str = "recipe.yaml", **sections: Any) -> Path:
        concept = {"folder": str(subject), "class_prompt": "a photo of a star"}
        data = {"resolution": 16, "concepts": [concept], "cache": {"folder": str(tmp_path / "cache")}}
        return write_recipe(
            name, **{"recipe": "textual_inversion", "adapter": adapter(), "prior": NONE, "data": data, **sections}
        )

    return make


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_page_trains_and_its_files_verify(write: WriteRecipe, tmp_path: Path, tiny_sd: Path) -> None:
    """METHODS 2.9: from pictures to a file that diffusers reads, with previews and a report on the way."""
    sampler = {"steps": 1, "guidance": 2.0}
    samples = {"every": 2, "prompts": ["a <zib> on grass"], "sampler": sampler}
    report = {"enabled": True, "prompts": ["a <zib> at night"], "sampler": sampler, "per_prompt": 1}
    textual_inversion.main(read_recipe(write(samples=samples, report=report)))
    run = tmp_path / "run"
    assert [row["step"] for row in losses(run)] == [1, 2, 3]
    assert sorted(path.name for path in (run / "adapters").iterdir()) == sorted(NAMES)
    with Image.open(run / "samples" / "step-000002" / "0-0.png") as picture:
        assert picture.size == (16, 16)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "load_textual_inversion" in page and "load_lora_weights" not in page
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.load_textual_inversion(str(run / "adapters"))
    assert pipeline.tokenizer.tokenize("a <zib>") == ["a</w>", "<zib>"]


@pytest.mark.parametrize("mixed_precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["pairwise", "mixed", "model"])
def test_under_every_prior_with_masks_and_average(
    layout: str, mixed_precision: str, write: WriteRecipe, subject: Path, tmp_path: Path
) -> None:
    """Prior preservation, which has nothing to hold here, masks, EMA, dropout and half precision: all of it runs."""
    sampler = {"steps": 1, "guidance": 2.0}
    prior = (
        {"kind": "model"} if layout == "model" else {"kind": "images", "layout": layout, "count": 2, "sampler": sampler}
    )
    concept = {
        "folder": str(subject),
        "class_prompt": "a photo of a star",
        "prompt": "a photo of <zib> star",
        "trigger": "<zib>",
        "masks": str(subject / "masks"),
    }
    data = {
        "resolution": 16,
        "concepts": [concept],
        "flip": True,
        "caption_dropout": 0.2,
        "cache": {"folder": str(tmp_path / "cache")},
    }
    train = {
        "steps": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "threads": 1,
        "ema": {"decay": 0.9},
        "mixed_precision": mixed_precision,
        "gradient_checkpointing": True,
    }
    recipe = write(recipe="dreambooth", prior=prior, train=train, data=data, adapter=adapter(regularisation=0.1))
    dreambooth.main(read_recipe(recipe))
    logged = losses(tmp_path / "run")
    assert all("loss_prior" in row and "loss_penalty" in row for row in logged)
    if layout == "model":
        assert all(row["loss_prior"] == 0.0 for row in logged)  # no class caption holds the word
    assert load_file(tmp_path / "run" / "adapters" / NAMES[0])["<zib>"].dtype == torch.float32


CONSTRAINED = {
    "norm": {"kind": "decay"},
    "progressive_steps": 3,
    "regularisation": 0.1,
}


@pytest.mark.parametrize("changes", [{}, CONSTRAINED], ids=["plain", "constrained"])
def test_resumed_is_uninterrupted(
    changes: dict[str, Any], write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also where a word grows and its length is kept; the stop is off the checkpoint's step."""
    train = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "threads": 1, "ema": {"decay": 0.9}}
    sections = {"train": train, "checkpoint": {"every": 2}, "adapter": adapter(**changes)}

    class Interrupted(Exception):
        pass

    def breaking(trainer: Trainer, batch: Any, update: Any = Trainer.update) -> Any:
        if trainer.step == 5 and trainer.folder.path.parent.name == "broken":
            raise Interrupted
        return update(trainer, batch)

    textual_inversion.main(read_recipe(write("whole.yaml", output=str(tmp_path / "whole" / "run"), **sections)))
    broken = read_recipe(write("broken.yaml", output=str(tmp_path / "broken" / "run"), **sections))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "update", breaking)
        textual_inversion.main(broken)
    textual_inversion.main(broken)
    for name in NAMES:
        one, two = (tmp_path / side / "run" / "adapters" / name for side in ("whole", "broken"))
        assert one.read_bytes() == two.read_bytes(), name
    one, two = (
        [{name: value for name, value in row.items() if "loss" in name} for row in losses(tmp_path / side / "run")]
        for side in ("whole", "broken")
    )
    assert one == two


def test_checkpoints_hold_the_new_rows_alone(write: WriteRecipe, tmp_path: Path) -> None:
    """METHODS 2.3: neither weights nor optimizer state of the table."""
    textual_inversion.main(read_recipe(write(checkpoint={"every": 3})))
    files = list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    sizes = [tensor.numel() for file in files for tensor in load_file(file).values()]
    assert files and max(sizes) == 2 * 16


def test_a_word_in_no_caption_stops_before_training(write: WriteRecipe, tmp_path: Path) -> None:
    recipe = read_recipe(write(adapter=adapter(templates=None)))
    with pytest.raises(UserError, match="'<zib>' stands in no caption"):
        textual_inversion.main(recipe)


@pytest.mark.slow
def test_two_processes_do_what_one_does(write: WriteRecipe, tmp_path: Path) -> None:
    train = {"steps": 4, "learning_rate": 1e-2, "threads": 1}
    one = write("one.yaml", train={**train, "batch_size": 2}, output=str(tmp_path / "one"))
    two = write("two.yaml", train={**train, "batch_size": 1}, output=str(tmp_path / "two"))
    page = str(Path("recipes/textual_inversion.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    for command in ([sys.executable, page, "--config", str(one)], [*launcher, page, "--config", str(two)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes (DDP, gloo)" in done.stdout
    first, second = (load_file(tmp_path / run / "adapters" / NAMES[0])["<zib>"] for run in ("one", "two"))
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_vector_learns(write: WriteRecipe, tmp_path: Path) -> None:
    """METHODS 2.9, end to end: vectors that began at the same word go ways of their own."""
    tokens = [{"token": "<zib>", "vectors": 3, "initializer": "star"}]
    train = {"steps": 60, "batch_size": 3, "learning_rate": 5e-2, "threads": 1, "optimizer": {"weight_decay": 0.0}}
    textual_inversion.main(read_recipe(write(adapter=adapter(tokens=tokens, templates="object"), train=train)))
    rows = load_file(tmp_path / "run" / "adapters" / NAMES[0])["<zib>"]
    assert torch.pdist(rows).min() > 0.1  # all began at the same word
