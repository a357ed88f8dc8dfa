"""The autoencoder: 64 x 64 x 3 to 16 x 16 x 4 and back (AutoencoderKL, factor 4, no attention)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from finetune.tinyworld.training import data
from finetune.tinyworld.training.fit import Plan, fit

KL_WEIGHT = 1e-6
OBJECT_WEIGHT = 5.0


def build(widths: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def reconstruction_loss(vae: Any, pictures: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """L1 of pixels and of their differences to neighbours, the object counted 5 times, and a whiff of KL.

    Args:
        pictures: float (B, 3, h, w) in [-1, 1].
        masks: float (B, 1, h, w), 1 = object.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
    error = decoded.float() - pictures
    weight = 1 + (OBJECT_WEIGHT - 1) * nn.functional.max_pool2d(masks, 3, stride=1, padding=1)
    pixels = (weight * (error.abs() + error.square())).mean()
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return pixels + 0.5 * edges + KL_WEIGHT * divergence


def train(folder: Path, steps: int, batch: int, seed: int) -> None:
    """Train to ``folder``: random 32 x 32 windows first, whole pictures for the last third."""
    sets = [data.training_scenes(folder.parent / "data"), data.training_individuals(folder.parent / "data")]
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        whole = step >= steps * 2 // 3
        count = batch // 4 if whole else batch
        pictures, masks = draw_batch(sets, count, 64 if whole else 32, generator)
        return reconstruction_loss(network, pictures, masks, generator)

    averaged: Any = fit(
        vae, loss_of, Plan(steps, 2e-3, warmup=steps // 20, average=0.998, decay=0.0, seed=seed), folder
    )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        averaged.save_pretrained(folder / "model")


def draw_batch(sets: list[data.Pictures], count: int, window: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows (B, 3, window, window) in [-1, 1] and their masks; a third of them shows individuals."""
    corners = torch.randint(0, 65 - window, (count, 2), generator=generator).tolist()
    choices = torch.rand(count, 2, generator=generator).tolist()
    pictures, masks = [], []
    for (which, where), (top, left) in zip(choices, corners, strict=True):
        chosen = sets[which < 0.33]
        index = int(where * len(chosen))
        pictures.append(chosen.pictures[index, top : top + window, left : left + window])
        masks.append(chosen.masks[index, top : top + window, left : left + window])
    tensor = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor, torch.from_numpy(np.stack(masks))[:, None].float() / 255
