"""The page recipes/aesthetic.py: from pictures to files that draw. METHODS 5.1, 5.2 and 5.4."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel

import finetune
from finetune.config import read_recipe
from finetune.errors import UserError
from finetune.export import verify
from finetune.families.tiny import write_tiny_clip
from finetune.plan import plan, render
from recipes import aesthetic

WriteRecipe = Callable[..., Path]
PROMPTS = ["a red star", "a blue heart at night"]


@pytest.fixture
def write(write_recipe: WriteRecipe, tiny_sd: Path, subject: Path, tmp_path: Path) -> WriteRecipe:
    """Write a recipe for the pictures of ``subject``, without their captions."""
    clip = write_tiny_clip(tmp_path / "clip", tiny_sd)
    for caption in subject.glob("*.txt"):
        caption.unlink()

    def recipe(adapter: dict[str, Any] | None = None, **sections: Any) -> Path:
        settings = {"kind": "aesthetic", "clip": str(clip), "steps": 3, "learning_rate": 1e-3, **(adapter or {})}
        data = {"resolution": 16, "concepts": [{"folder": str(subject)}], "cache": {"folder": str(tmp_path / "cache")}}
        own = {"prior": {"kind": "none"}, "train": {"threads": 1}, "data": data}
        return write_recipe(recipe="aesthetic", adapter=settings, **{**own, **sections})

    return recipe


def shown(enabled: bool = True) -> dict[str, Any]:
    return {"enabled": enabled, "prompts": PROMPTS, "per_prompt": 1, "sampler": {"steps": 2, "guidance": 2.0}}


def test_the_embedding_is_the_mean_of_the_clips_features(write: WriteRecipe, subject: Path, tmp_path: Path) -> None:
    """METHODS 5.1: e is the mean of the unnormalised image embeddings; pictures need no captions."""
    aesthetic.main(read_recipe(write(report=shown(enabled=False))))
    held = load_file(tmp_path / "run" / "adapters" / "run.safetensors")["image_embedding"]
    assert torch.equal(torch.load(tmp_path / "run" / "adapters" / "run.pt", weights_only=True), held)
    model: Any = CLIPModel.from_pretrained(tmp_path / "clip")
    size = {"height": 16, "width": 16}
    pictures = [Image.open(path) for path in sorted(subject.glob("*.png"))]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    with torch.no_grad():
        features = model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(held, features.mean(0, keepdim=True), rtol=1e-3, atol=1e-3)


def test_the_same_recipe_makes_the_same_bytes_and_may_run_again(write: WriteRecipe, tmp_path: Path) -> None:
    recipe = read_recipe(write({"bake_prompts": PROMPTS, "bake_rank": 2}, report=shown(enabled=False)))
    adapters = tmp_path / "run" / "adapters"

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(adapters)): path.read_bytes() for path in adapters.rglob("*") if path.is_file()}

    aesthetic.main(recipe)
    first = files()
    aesthetic.main(recipe)
    assert files() == first
    lora = {"pytorch_lora_weights.safetensors", "run.safetensors", "run.json"}
    assert first.keys() == {"run.safetensors", "run.pt", *(f"baked/{name}" for name in lora)}


def test_the_baked_lora_does_what_the_steps_do(write: WriteRecipe, tiny_sd: Path, tmp_path: Path) -> None:
    """METHODS 5.2, bake: at full rank, of one prompt, the LoRA goes most of the way that the steps go."""
    adapter = {"bake_prompts": PROMPTS[:1], "bake_rank": 16, "weight": 1.0}
    aesthetic.main(read_recipe(write(adapter, report=shown(enabled=False))))
    adapters = tmp_path / "run" / "adapters"
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)

    def encode() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.encode_prompt(PROMPTS[0], "cpu", 1, False)[0]

    plain = encode()
    with finetune.load_aesthetic(pipeline, adapters / "run.safetensors"):
        stepped = encode()
    pipeline.load_lora_weights(adapters / "baked")
    baked = encode()
    assert float((baked - stepped).norm()) < 0.8 * float((plain - stepped).norm())  # tables and norms do not fit in
    assert verify(adapters / "baked" / "run.safetensors").passed


def test_the_plan_says_what_the_run_writes(write: WriteRecipe, tmp_path: Path) -> None:
    recipe = read_recipe(write({"bake_prompts": PROMPTS}, report=shown()))
    planned = plan(recipe)
    assert planned.trainable == {}
    assert planned.arithmetic is None
    page = io.StringIO()
    render(planned, Console(file=page, width=400))
    assert "trains nothing" in " ".join(page.getvalue().split())
    assert "steps" not in {line.split()[0] for line in page.getvalue().splitlines() if line[:1].strip()}
    aesthetic.main(recipe)
    for name in planned.output.files:
        assert (tmp_path / "run" / name).exists(), name


def test_the_report_shows_prompts_before_and_after(write: WriteRecipe, tmp_path: Path) -> None:
    aesthetic.main(read_recipe(write(report=shown())))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Mean cosine of the drawn pictures and the embedding" in page
    assert all(prompt in page for prompt in PROMPTS)
    assert "finetune.load_aesthetic(pipeline" in page
    assert page.count("data:image/png") >= 3 + 2 * 2  # pictures, two prompts before and after


def test_a_resolution_or_clip_that_does_not_fit_is_refused(write: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a multiple of"):
        aesthetic.main(read_recipe(write(report=shown()), ["data.resolution=17"]))
    with pytest.raises(UserError, match="cannot be loaded"):
        aesthetic.main(read_recipe(write({"clip": str(tmp_path / "nowhere")}, report=shown())))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_embedded_style_from_the_command_line(tmp_path: Path) -> None:
    """The shipped tiny recipe, then ``verify`` and ``sample`` on what it wrote: METHODS 5.4 end to end."""
    run, out = tmp_path / "run", tmp_path / "star.png"
    command = [sys.executable, "-m", "finetune"]
    fast = ["report.sampler.steps=5", "report.per_prompt=2", "adapter.steps=20", "adapter.weight=1.0"]
    cache = f"data.cache.folder={tmp_path / 'cache'}"
    for arguments in (
        ["train", "recipes/configs/aesthetic-tiny.yaml", f"output={run}", cache, *fast],
        ["verify", str(run)],
        ["verify", str(run / "adapters" / "run.pt"), "--base", "tinyworld"],
        ["verify", str(run / "adapters" / "baked" / "run.safetensors")],
        ["sample", str(run), "--prompt", "a red star", "--steps", "3", "--out", str(out)],
        ["sample", str(run / "adapters" / "run.pt"), "--base", "tinyworld", "--prompt", "a", "--out", str(out)],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        if arguments[0] == "train":
            line = next(line for line in done.stdout.splitlines() if line.startswith("Mean cosine of the drawn"))
            before, after = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
            assert after > before
            assert (run / "report.html").is_file()
    assert Image.open(out).size == (64, 64)
