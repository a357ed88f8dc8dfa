"""How a latent is spoiled and what is asked back. Pure tensor arithmetic; nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Noised(NamedTuple):
    """A question for the denoiser and its answer."""

    noisy: Tensor  # [B, C, h, w]  what the denoiser sees
    timesteps: Tensor  # [B]       how far along, in the denoiser's own unit
    target: Tensor  # [B, C, h, w] what it should say
    weight: Tensor  # [B] float32  how much each sample counts


class Objective(Protocol):
    """A way to spoil latents. Its draws come from outside, one generator per sample."""

    def timesteps(self, rngs: Sequence[torch.Generator]) -> Tensor:
        """Draw one time per generator, [B] on the CPU."""
        ...

    def spoil(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Mix ``clean`` and ``noise`` [B, C, h, w] at ``timesteps`` [B]."""
        ...


@dataclass(frozen=True)
class DDPM:
    """Discrete-time diffusion (Ho et al. 2020, https://arxiv.org/abs/2006.11239): SD 1.x, SD 2.x, SDXL.

    With ``a = sqrt(alphas_cumprod[t])`` and ``s = sqrt(1 - alphas_cumprod[t])`` the denoiser sees ``a x0 + s eps``.

    Args:
        alphas_cumprod: signal power kept at each of T timesteps, float [T].
        prediction: epsilon asks for ``eps``; v_prediction for ``a eps - s x0`` (Salimans & Ho 2022,
            https://arxiv.org/abs/2202.00512, appendix D); sample for ``x0``.
        min_snr_gamma: of Min-SNR weighting (Hang et al. 2023, https://arxiv.org/abs/2303.09556, eq. 5): the loss on
            ``x0`` is weighted ``min(SNR, gamma)``, converted exactly to the prediction; None: no weighting.

    Raises:
        ValueError: the table ends at zero signal (zero-terminal SNR) and the prediction is epsilon, which then
            says nothing about the picture.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.prediction == "epsilon" and bool((self.alphas_cumprod == 0).any()):
            raise ValueError("epsilon prediction cannot be trained with zero terminal SNR; use v_prediction")

    def timesteps(self, rngs: Sequence[torch.Generator]) -> Tensor:
        """Uniform integers in [0, T), int64 [B]."""
        return torch.cat([torch.randint(len(self.alphas_cumprod), (1,), generator=rng) for rng in rngs])

    def spoil(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Mix ``clean`` and ``noise`` [B, C, ...] at ``timesteps`` (int64 [B])."""
        kept = self.alphas_cumprod.to(clean.device, torch.float32)[timesteps]
        signal, spoiled = (_like(part.sqrt(), clean) for part in (kept, 1 - kept))
        match self.prediction:
            case "epsilon":
                target = noise
            case "v_prediction":
                target = signal * noise - spoiled * clean
            case "sample":
                target = clean
        return Noised(signal * clean + spoiled * noise, timesteps, target, self._weight(kept / (1 - kept)))

    def _weight(self, snr: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(snr)
        capped = snr.clamp(max=self.min_snr_gamma)
        match self.prediction:
            case "epsilon":
                return capped / snr
            case "v_prediction":
                return capped / (snr + 1)
            case "sample":
                return capped


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """``values`` [B] shaped to multiply ``latents`` [B, ...] of any number of axes, in their dtype."""
    return values.view(-1, *(1,) * (latents.ndim - 1)).to(latents.dtype)
