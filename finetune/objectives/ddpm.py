"""Discrete-time diffusion (Ho et al. 2020, https://arxiv.org/abs/2006.11239): SD 1.x, SD 2.x, SDXL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objective import Prediction
from finetune.objectives import predictions
from finetune.objectives.process import like

LARGEST_SNR = 1e8  # a little more than float32 can tell from no noise at all


@dataclass(frozen=True)
class DDPM:
    """With ``a = sqrt(alphas_cumprod[t])`` and ``s = sqrt(1 - alphas_cumprod[t])`` the denoiser sees ``a x0 + s eps``.

    Args:
        alphas_cumprod: signal power kept at each of T timesteps, float [T].
        prediction: what is asked.

    Raises:
        ValueError: the table ends at zero signal (zero-terminal SNR) and the prediction is epsilon, which then
            says nothing about the picture.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction == "epsilon" and bool((self.alphas_cumprod == 0).any()):
            raise ValueError("epsilon prediction cannot be trained with zero terminal SNR; use v_prediction")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def timesteps(self, share: Tensor) -> Tensor:
        """Whole numbers in [0, T), int64 [B]."""
        return (share * self.steps).long().clamp(0, self.steps - 1)

    def progress(self, timesteps: Tensor) -> Tensor:
        """T / T."""
        return timesteps / self.steps

    def mix(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``a x0 + s eps``."""
        signal, spoiled = self.parts(clean, timesteps)
        return signal * clean + spoiled * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As ``finetune.objectives.predictions`` has it."""
        return predictions.target(self.prediction, clean, noise, *self.parts(clean, timesteps))

    def parts(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` and ``s``, shaped to multiply ``latents``."""
        kept = self._kept(timesteps)
        return like(kept.sqrt(), latents), like((1 - kept).sqrt(), latents)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ``a^2 / s^2``, float32 [B], finite."""
        kept = self._kept(timesteps)
        return (kept / (1 - kept)).clamp(max=LARGEST_SNR)

    def _kept(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
