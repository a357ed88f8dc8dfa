"""The loop around a real family: LoRA with dropout in a small Stable Diffusion, with previews on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_run import recipe

from finetune.adapters import attach
from finetune.batch import Batch, Conditioning, Posterior
from finetune.config.adapters import LoraConfig
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig, SamplesConfig
from finetune.denoise import denoising_error
from finetune.distributed import start
from finetune.errors import GuardError
from finetune.families import load_family
from finetune.preview import preview
from finetune.randomness import generator
from finetune.train import Trainer


class Pictures:
    """Random latents and prompts, the same for a given step."""

    def __init__(self, width: int) -> None:
        self._width = width

    def from_step(self, step: int) -> Iterator[Batch]:
        while True:
            mean, tokens = (
                torch.randn(shape, generator=generator(1, "test", step))
                for shape in ((2, 4, 8, 8), (2, 5, self._width))
            )
            yield Batch(
                ids=("a.png", "b.png"),
                draws=(2 * step, 2 * step + 1),
                captions=("a", "b"),
                posterior=Posterior(mean=mean, logvar=torch.full_like(mean, -3.0)),
                prior=torch.tensor([False, False]),
                weight=torch.ones(2),
                geometry=torch.zeros(2, 6, dtype=torch.int64),
                prompt=Conditioning(tokens=tokens),
            )
            step += 1


def lora_recipe(output: Path, tiny: Path, text_encoder: bool = False) -> Recipe:
    base = recipe(output, steps=4, every=2, learning_rate=1e-2, ema={"decay": 0.9})
    return base.model_copy(
        update={
            "recipe": "lora",
            "adapter": LoraConfig(kind="lora", rank=2, dropout=0.5, targets="cross-kv", text_encoder=text_encoder),
            "data": base.data.model_copy(update={"resolution": 16}),
            "model": ModelConfig(path=str(tiny)),
            "samples": SamplesConfig(every=2, prompts=["a red star"], sampler=SamplerConfig(steps=1)),
        }
    )


def train(run: Recipe, until: int | None = None, look: bool = True) -> dict[str, torch.Tensor]:
    processes = start(run.train)
    family = load_family(run.model)
    adapter = attach(run.adapter, family, run.seed)
    denoiser = family.networks["denoiser"]

    def loss(batch: Batch) -> torch.Tensor:
        return denoising_error(family, batch, run.seed).mean()

    trainer = Trainer(run, processes, family.networks, adapter, loss)
    for batch in trainer.steps(Pictures(denoiser.config.cross_attention_dim)):  # type: ignore[union-attr]
        trainer.update(batch)
        if look and trainer.every(run.samples.every):
            preview(trainer, family, run.samples.prompts)
        if trainer.step == until:
            break
    return trainer.finish()[0].tensors


def test_neither_an_interruption_nor_a_preview_changes_a_bit(tmp_path: Path, tiny_sd: Path) -> None:
    whole = train(lora_recipe(tmp_path / "whole", tiny_sd), look=False)
    train(lora_recipe(tmp_path / "broken", tiny_sd), until=3)
    broken = train(lora_recipe(tmp_path / "broken", tiny_sd))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)
    for step in (2, 4):
        with Image.open(tmp_path / "broken" / "samples" / f"step-{step:06d}" / "0-0.png") as picture:
            assert picture.size == (16, 16)


def test_weights_that_the_loss_does_not_use_are_named(tmp_path: Path, tiny_sd: Path) -> None:
    """A text encoder that is to train while prompts come from a cache learns nothing: that must not pass silently."""
    with pytest.raises(GuardError, match=r"no gradient reaches text_encoder\..*lora_A"):
        train(lora_recipe(tmp_path / "run", tiny_sd, text_encoder=True), look=False)
