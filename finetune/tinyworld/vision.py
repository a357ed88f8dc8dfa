"""The small convolutional network that looks at pictures: backbone of the judge and image tower of the small CLIP."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Eye(nn.Module):
    """Pictures to features by convolutions that halve the side four times.

    The last 4 x 4 map is flattened, not averaged, because the position is one of the things to be read.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, width * 3 // 2, width * 2, width * 2]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.features = sizes[-1] * 16

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) to features (B, ``features``)."""
        seen: Tensor = self.layers(pictures * 2 - 1)
        return seen.flatten(1)


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Light blur, noise and brightness shifts, each picture its own: what an autoencoder does to a picture, roughly."""
    count = len(pictures)
    soft = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.6)
    blurred = pictures + (soft - pictures) * amount
    noise = torch.randn(pictures.shape, generator=generator) * 0.04 * torch.rand(count, 1, 1, 1, generator=generator)
    shift = torch.randn(count, 3, 1, 1, generator=generator) * 0.02
    return (blurred + noise + shift).clamp(0, 1)
