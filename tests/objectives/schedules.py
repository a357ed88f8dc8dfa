"""The usual schedule, latents and noise, and how draws are named."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.objective import Draws, Prediction
from finetune.objectives import DDPM
from finetune.randomness import generator

PREDICTIONS: list[Prediction] = ["epsilon", "v_prediction", "sample"]
TIMES = torch.tensor([0, 100, 300, 500, 700, 900, 999])


def scheduler(**changes: object) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **changes
    )


def ddpm(prediction: Prediction = "epsilon") -> DDPM:
    return DDPM(scheduler().alphas_cumprod, prediction)


def latents(count: int = len(TIMES)) -> tuple[Tensor, Tensor]:
    """Clean ones and noise, [count, 4, 8, 8]."""
    rng = generator(0, "latents")
    return torch.randn(count, 4, 8, 8, generator=rng), torch.randn(count, 4, 8, 8, generator=rng)


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, [f"{number}.png" for number in range(count)], range(count))
