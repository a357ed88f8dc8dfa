from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator
from finetune.sampling import change_scheduler, draw

SAMPLER = SamplerConfig(steps=2, guidance=3.0)
PROMPTS = ["a photo of a red star", "a blue circle"]


class Share:
    """One of several processes; what the others drew is given."""

    def __init__(self, rank: int, world: int, others: Sequence[dict[int, Image.Image]] = ()) -> None:
        self.rank, self.world, self.others = rank, world, others
        self.mine: dict[int, Image.Image] = {}

    def doing(self, text: str) -> None:
        """Nobody waits."""

    def gather_object(self, value: dict[int, Image.Image]) -> list[dict[int, Image.Image]]:
        self.mine = value
        return [*self.others, value]


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool((np.asarray(one) == np.asarray(other)).all())


def test_a_picture_is_diffusers_own(tiny_sd: Path, tiny_family: ModelFamily) -> None:
    """Bit for bit what a person gets who loads the folder and names the same generator."""
    drawn = draw(tiny_family, PROMPTS, 2, SAMPLER, seed=5)
    assert len(drawn) == 4
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32)
    rng = generator(5, "sample", 1, 1)
    theirs = pipeline(PROMPTS[1], num_inference_steps=2, guidance_scale=3.0, generator=rng).images[0]
    assert same(drawn[3], theirs)
    assert not same(drawn[2], drawn[3])


def test_neither_the_company_nor_the_processes_change_a_bit(tiny_family: ModelFamily) -> None:
    alone = draw(tiny_family, PROMPTS, 2, SAMPLER, seed=5)
    assert same(draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=5)[0], alone[0])
    first = Share(0, 2, [{1: alone[1], 3: alone[3]}])
    together = draw(tiny_family, PROMPTS, 2, SAMPLER, 5, first)  # type: ignore[arg-type]
    assert list(first.mine) == [0, 2]
    assert all(map(same, together, alone))


def test_all_is_left_as_it_was(tiny_family: ModelFamily) -> None:
    tiny_family.require("denoiser")
    denoiser = tiny_family.networks["denoiser"].train()
    denoiser.mid_block.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in denoiser.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in denoiser.modules()] == modes
    assert set(tiny_family.networks) == {"denoiser"}


def test_dropout_is_off(tiny_family: ModelFamily) -> None:
    tiny_family.require("denoiser")
    still = draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=0)[0]
    for module in tiny_family.networks.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    tiny_family.networks.train()
    assert same(draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=0)[0], still)


def test_another_scheduler_is_used_and_an_unknown_one_is_named(tiny_family: ModelFamily) -> None:
    own = draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=0)[0]
    other = draw(tiny_family, PROMPTS[:1], 1, SAMPLER.model_copy(update={"scheduler": "EulerDiscreteScheduler"}), 0)[0]
    assert not same(own, other)
    with pytest.raises(UserError, match="did you mean 'EulerDiscreteScheduler'"):
        draw(tiny_family, PROMPTS[:1], 1, SAMPLER.model_copy(update={"scheduler": "EulerDiscretScheduler"}), 0)
    assert same(draw(tiny_family, PROMPTS[:1], 1, SAMPLER, seed=0)[0], own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        lambda: _registered_later(DDPMScheduler(beta_schedule="scaled_linear")),
        lambda: PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
    ],
)
def test_clipping_does_not_come_back(make: Callable[[], DDPMScheduler]) -> None:
    """It would cut latents to [-1, 1]; each of these settings turns it on in plain ``DDIMScheduler.from_config``."""
    changed = change_scheduler(make(), "DDIMScheduler")
    assert isinstance(changed, DDIMScheduler)
    assert changed.config.clip_sample is False
    assert changed.config.beta_schedule == "scaled_linear"


def _registered_later(scheduler: DDPMScheduler) -> DDPMScheduler:
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def test_an_oracle_denoiser_brings_back_the_latents() -> None:
    """With latents far outside [-1, 1], which clipping would ruin."""
    scheduler = change_scheduler(DDPMScheduler(beta_schedule="scaled_linear"), "DDIMScheduler")
    scheduler.set_timesteps(20)
    clean, noise = 3 * torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[timestep]
        epsilon = (latents - kept.sqrt() * clean) / (1 - kept).sqrt()
        latents = scheduler.step(epsilon, timestep, latents).prev_sample
    assert torch.allclose(latents, clean, atol=0.2)
    assert (latents - clean).abs().mean() < 0.05


def test_prompts_without_pictures_draw_nothing(tiny_sd: Path) -> None:
    assert draw(load_family(ModelConfig(path=str(tiny_sd))), [], 3, SAMPLER, seed=0) == []
