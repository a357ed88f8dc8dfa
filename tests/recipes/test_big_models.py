"""A run whose base lies in memory in other ways, from the recipe to the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.config import read_recipe
from finetune.config.schema import SamplerConfig
from finetune.export import sample, verify
from recipes import dreambooth

WriteRecipe = Callable[..., Path]
FILE = "adapters/pytorch_lora_weights.safetensors"
CHECKPOINTED = "train.gradient_checkpointing=true"


def run(path: Path, output: Path, *overrides: str) -> Path:
    dreambooth.main(read_recipe(path, [f"output={output}", *overrides]))
    return output


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dtype=bfloat16", "model.quantize={kind: int8}", "model.block_swap=2", CHECKPOINTED),
        ("profile=12gb", "prior={kind: model}"),
    ],
    ids=["by hand", "profile"],
)
def test_what_is_trained_on_a_small_base_is_verified_on_the_true_one(
    write_recipe: WriteRecipe, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    report = "report={enabled: true, per_prompt: 1, prompts: [a photo of zib star], sampler: {steps: 1}}"
    output = run(write_recipe(), tmp_path / "run", report, "samples={every: 3, sampler: {steps: 1}}", *overrides)
    assert (output / "report.html").is_file()
    assert list((output / "samples").rglob("*.png"))
    verify(output / FILE).require()
    assert {str(one.dtype) for one in load_file(output / FILE).values()} == {"torch.float32"}
    (picture,) = sample.sample(output, ["a photo of zib star"], sampler=SamplerConfig(steps=1), resolution=16)
    assert picture.size == (16, 16)


def test_what_needs_whole_weights_is_previewed_on_them(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """LoHa in kohya's layout alone is added to the weights, which packed ones have no room for."""
    overrides = ("model.quantize={kind: int8}", "adapter={kind: loha, rank: 2}", "export={formats: [kohya]}")
    looked = "samples={every: 3, prompts: [a photo of zib star], sampler: {steps: 1, guidance: 1}}"
    output = run(
        write_recipe(), tmp_path / "run", "prior={kind: none}", "report={enabled: false}", "seed=3", looked, *overrides
    )
    settings = SamplerConfig(steps=1, guidance=1)
    (drawn,) = sample.sample(output, ["a photo of zib star"], seed=3, sampler=settings, resolution=16)
    with Image.open(output / "samples" / "step-000003" / "0-0.png") as preview:
        assert preview.tobytes() == drawn.tobytes()


def test_swapped_blocks_change_no_number_and_a_run_may_begin_with_them_and_end_without(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe()
    plain = run(path, tmp_path / "plain", CHECKPOINTED)
    swapped = run(path, tmp_path / "swapped", CHECKPOINTED, "model.block_swap=3")
    one, other = load_file(plain / FILE), load_file(swapped / FILE)  # headers say which recipe it was
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (plain / "metrics.jsonl").read_text().count("\n") == 3
    run(path, tmp_path / "plain", CHECKPOINTED, "model.block_swap=1")  # is already trained, and no other run
