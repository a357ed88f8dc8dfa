"""The denoiser: SD 1's layout at a 160th of its size, v-prediction, trained on the latents of the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from finetune.tinyworld import captions, world
from finetune.tinyworld.tokenizer import build as build_tokenizer
from finetune.tinyworld.training import data, latents
from finetune.tinyworld.training.fit import Plan, fit

NO_CAPTION = 0.1


def build(context: int = 128) -> UNet2DConditionModel:
    """The untrained denoiser for latents (B, 4, 16, 16)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The sampler and the noise schedule.

    Every value is given, because values that were defaults do not survive a change of the scheduler's class. The last
    beta is larger than SD 1's so that the last step is all but pure noise (abar 2e-4): otherwise a trace of the
    background's brightness is left in training and missing in sampling.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        thresholding=False,
        rescale_betas_zero_snr=False,
    )


def velocity_loss(
    unet: nn.Module, clean: Tensor, context: Tensor, signal: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of v = a*eps - s*x0 (Salimans & Ho 2022), weighted ``weight_of(SNR)``.

    Args:
        clean: scaled latents float (B, 4, 16, 16).
        context: text encoder output (B, 24, 128).
        signal: the schedule's abar, float (1000,).
    """
    count = len(clean)
    times = (strata(count, generator) * len(signal)).long()
    noise = torch.randn(clean.shape, generator=generator)
    abar = signal[times, None, None, None]
    noisy, target = abar.sqrt() * clean + (1 - abar).sqrt() * noise, abar.sqrt() * noise - (1 - abar).sqrt() * clean
    with torch.autocast("cpu", torch.bfloat16):
        guess = unet(noisy, times, context).sample
    snr = signal[times] / (1 - signal[times])
    return ((guess.float() - target).square().mean((1, 2, 3)) * weight_of(snr)).mean()


def strata(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (B,), one in each of ``count`` equal parts of [0, 1)."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def weight_of(snr: Tensor) -> Tensor:
    """Weights of v errors, (B,) -> (B,): little for nearly clean latents, whose noise no caption explains."""
    return 5 / (5 + snr)


def train(
    folder: Path, steps: int, batch: int, seed: int, clip: str = "clip", start: str = "", hold: float = 0.6
) -> None:
    """Train to ``folder/model`` on the latents beside ``folder``, with the text encoder of the stage ``clip``.

    The weights are random at first, or those of the stage ``start``.
    """
    scenes = data.training_scenes(folder.parent / "data")
    mean, logvar, scale = latents.load(folder.parent / "latents")
    tokenizer = build_tokenizer()
    text: Any = CLIPTextModel.from_pretrained(folder.parent / clip / "model" / "text_encoder")
    text = latents.rounded(text).eval().requires_grad_(False)
    signal = build_scheduler().alphas_cumprod
    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel.from_pretrained(folder.parent / start / "model") if start else build()
    unet = unet.train().to(memory_format=torch.channels_last)

    def loss_of(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(scenes), (batch,), generator=generator)
        key = int(torch.randint(2**31, (), generator=generator))
        words = [caption_for(scenes, int(row), key) for row in rows]
        ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        clean = latents.sampled(mean, logvar, rows, generator) * scale
        context = text(ids).last_hidden_state
        return velocity_loss(network, clean, context, signal, generator)

    averaged: Any = fit(unet, loss_of, Plan(steps, 8e-4, hold=hold, average=0.999, seed=seed), folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        averaged.save_pretrained(folder / "model")


def caption_for(scenes: data.Pictures, row: int, key: int) -> str:
    """A fresh caption of a scene, or none in one of ten cases, which is what makes guidance possible."""
    generator = world.rng("caption", key, row)
    if generator.random() < NO_CAPTION:
        return ""
    return captions.caption(data.named_factors(scenes.factors[row]), generator)[0]
