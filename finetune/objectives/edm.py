"""EDM's preconditioning (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1): Playground 2.5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objective import Prediction
from finetune.objectives import predictions
from finetune.objectives.process import like


@dataclass(frozen=True)
class EDM:
    """``D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4)`` should be ``x0``, where ``x = x0 + sigma eps``.

    With ``y = x0 / sigma_data``, ``a = sigma_data / r``, ``s = sigma / r`` and ``r^2 = sigma^2 + sigma_data^2``, F sees
    ``c_in x = a y + s eps``, and what it should answer, ``(x0 - c_skip x) / c_out``, is ``a eps - s y``: v-prediction
    of y, or its negative where the base was trained with the other sign of ``c_out``. EDM's weight of the error of D,
    ``r^2 / (sigma sigma_data)^2``, is 1 for the error of F.

    The way to noise is measured as ``sigma / (1 + sigma)``, so that a logit-normal time is EDM's log-normal sigma.

    Args:
        prediction: ``v_prediction``, or ``epsilon`` for the other sign, as diffusers' schedulers call the two.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    prediction: Prediction = "epsilon"
    steps: int = 1000

    def timesteps(self, share: Tensor) -> Tensor:
        """``ln(sigma) / 4``, float32 [B]."""
        sigma = (share / (1 - share)).clamp(self.sigma_min, self.sigma_max)
        return (sigma.log() / 4).float()

    def progress(self, timesteps: Tensor) -> Tensor:
        """``sigma / (1 + sigma)``."""
        return torch.sigmoid(4 * timesteps)

    def mix(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``c_in (x0 + sigma eps)``."""
        signal, spoiled = self._parts(clean, timesteps)
        return signal * (clean / self.sigma_data) + spoiled * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``(x0 - c_skip x) / c_out``."""
        v = predictions.target("v_prediction", clean / self.sigma_data, noise, *self._parts(clean, timesteps))
        return v if self.prediction == "v_prediction" else -v

    def _parts(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(4 * timesteps)
        length = (sigma.square() + self.sigma_data**2).sqrt()
        return like(self.sigma_data / length, latents), like(sigma / length, latents)
