"""The noise that latents are spoiled with. Every sample's depends on its own generators alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.objective import Draws


@dataclass(frozen=True)
class Pyramid:
    """Noise of several resolutions (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training").

    Args:
        discount: each coarser level counts so many times the one before.
        levels: at most; no level is coarser than one cell.
    """

    discount: float = 0.3
    levels: int = 6

    def __call__(self, noise: Tensor, draws: Draws) -> Tensor:
        """``noise`` [B, C, h, w] with the levels added, scaled to a standard deviation of 1 in every sample."""
        samples = [self._of(one, rng) for one, rng in zip(noise, draws.generators("pyramid noise"), strict=True)]
        return torch.stack(samples)

    def _of(self, noise: Tensor, rng: torch.Generator) -> Tensor:
        size = (noise.shape[-2], noise.shape[-1])
        total = noise
        for level in range(self.levels):
            coarse = (2 + 2 * float(torch.rand(1, generator=rng))) ** level
            height, width = (max(1, int(side / coarse)) for side in size)
            drawn = torch.randn(1, noise.shape[0], height, width, generator=rng)
            total = total + self.discount**level * F.interpolate(drawn, size, mode="bilinear")[0]
            if 1 in (height, width):
                break
        return total / total.std()


@dataclass(frozen=True)
class Noising:
    """How noise is made.

    Args:
        pyramid: adds coarser noise; comes first.
        offset: adds so many times one number per channel, so that brightness is learned (Guttenberg 2023,
            https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        offset_probability: share of draws that have an offset.
        perturbation: adds so many times fresh noise to what is mixed in and not to what is asked back (Ning et al.
            2023, https://arxiv.org/abs/2301.11706).
    """

    pyramid: Pyramid | None = None
    offset: float = 0.0
    offset_probability: float = 1.0
    perturbation: float = 0.0

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What is asked back, and what is mixed in, both float32 and of the shape of ``clean`` [B, C, h, w]."""
        shape = clean.shape[1:]
        noise = draws.normal("noise", shape)
        if self.pyramid is not None:
            noise = self.pyramid(noise, draws)
        if self.offset:
            noise = noise + self._offsets(shape, draws)
        mixed = noise
        if self.perturbation:
            mixed = noise + self.perturbation * draws.normal("input perturbation", shape)
        return noise.to(clean.device), mixed.to(clean.device)

    def _offsets(self, shape: torch.Size, draws: Draws) -> Tensor:
        drawn = draws.normal("offset noise", (shape[0], *(1,) * (len(shape) - 1)))
        taken = draws.uniform("offset noise taken") < self.offset_probability
        return self.offset * torch.where(taken.view(-1, *(1,) * len(shape)), drawn, 0)
