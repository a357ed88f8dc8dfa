"""How much a time counts.

For diffusion a weight is a curve ``w(S)`` of the error of the picture x0, S being the signal-to-noise ratio. The errors
of one mistake are ``|x0|^2 = |eps|^2 / S = |v|^2 / (S + 1)``, so that the same loss has the weight ``w / S`` on epsilon
and ``w / (S + 1)`` on v: whatever is predicted, the same mistake costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objective import Prediction
from finetune.objectives.ddpm import DDPM
from finetune.objectives.flow import Flow

Weighting = Callable[[Tensor], Tensor]
"""Times in the denoiser's unit [B] -> weights, float32 [B]."""

DEBIASED_SNR = 1000.0  # where the paper's code stops the weight from falling


def even(timesteps: Tensor) -> Tensor:
    """Every time counts alike."""
    return torch.ones(len(timesteps), device=timesteps.device)


@dataclass(frozen=True)
class BySnr:
    """A curve of the picture's error, as a weight of what is predicted.

    Args:
        least: no time counts less. At zero-terminal SNR every curve gives v the weight 0.
    """

    process: DDPM
    curve: Callable[[Tensor], Tensor]
    least: float = 0.0

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Weights of what is predicted."""
        snr = self.process.snr(timesteps)
        weight = converted(self.curve(snr), snr, self.process.prediction)
        return weight.clamp(min=self.least) if self.least else weight


def converted(weight: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
    """A weight of the picture's error, as one of the error of ``prediction``."""
    match prediction:
        case "epsilon":
            return weight / snr
        case "v_prediction":
            return weight / (snr + 1)
        case "sample":
            return weight
        case "flow_prediction":
            raise ValueError("a flow has no weights by SNR")


def like_epsilon(snr: Tensor) -> Tensor:
    """``S``: 1 for epsilon, and v counts as epsilon would."""
    return snr


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """``min(S, gamma)`` (Hang et al. 2023, https://arxiv.org/abs/2303.09556, eq. 5)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """``S gamma / (S + gamma)``: as min-SNR without its corner (Crowson et al. 2024,
    https://arxiv.org/abs/2401.11605, section 4.4).
    """
    return snr * gamma / (snr + gamma)


def debiased(snr: Tensor) -> Tensor:
    """``sqrt(S)``, which is ``1 / sqrt(S)`` for epsilon, with S cut at 1000 (Yu et al. 2023,
    https://arxiv.org/abs/2310.08442).
    """
    return torch.maximum(snr.sqrt(), snr / math.sqrt(DEBIASED_SNR))


def p2(snr: Tensor, gamma: float, k: float) -> Tensor:
    """``S / (k + S)^gamma`` (Choi et al. 2022, https://arxiv.org/abs/2204.00227, eq. 8)."""
    return snr / (k + snr) ** gamma


@dataclass(frozen=True)
class BySigma:
    """A curve of flow matching's sigma."""

    process: Flow
    curve: Callable[[Tensor], Tensor]

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Weights of the velocity's error."""
        return self.curve(self.process.progress(timesteps))


def sigma_sqrt(sigma: Tensor) -> Tensor:
    """``sigma^-2``, under the name that SD 3's code gave it; very large near the picture."""
    return sigma**-2


def sigma_squared(sigma: Tensor) -> Tensor:
    """``sigma^2``: the error of the picture, ``x - sigma u``, in place of that of the velocity u."""
    return sigma**2


def cosmap(sigma: Tensor) -> Tensor:
    """``2 / (pi (1 - 2 sigma + 2 sigma^2))`` (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 3.1)."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
