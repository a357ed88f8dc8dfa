"""Zero-terminal SNR (Lin et al. 2023, https://arxiv.org/abs/2305.08891): the last timestep is nothing but noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SAMPLING: Mapping[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Settings of diffusers' schedulers without which such a model draws grey pictures."""


def rescaled(alphas_cumprod: Tensor) -> Tensor:
    """A table of signal power [T], its root moved and stretched to end at 0 (algorithm 1); the first value stays."""
    roots = alphas_cumprod.double().sqrt()
    first, last = roots[0], roots[-1]
    table = ((roots - last) * first / (first - last)).square().to(alphas_cumprod.dtype)
    table[0] = alphas_cumprod[0]
    return table
