"""Shifts of flow matching's times: larger pictures need more noise to lose as much
(Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Size = tuple[int, int]
Shift = Callable[[Tensor, Size], Tensor]
"""Times [B] in [0, 1] and the height and width of the latents -> shifted times."""


def unshifted(sigma: Tensor, size: Size) -> Tensor:
    """Times as they are."""
    return sigma


def static(sigma: Tensor, size: Size, factor: float) -> Tensor:
    """``k sigma / (1 + (k - 1) sigma)``: the middle goes to ``k / (k + 1)``, the ends stay."""
    return factor * sigma / (1 + (factor - 1) * sigma)


@dataclass(frozen=True)
class Dynamic:
    """The static shift by ``k = e^mu``, where ``mu`` is a line through two numbers of image tokens, as Flux has it.

    Args:
        base_shift, max_shift: ``mu`` at ``base_image_seq_len`` and ``max_image_seq_len`` tokens.
        patch: latent cells along a side of a token.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    patch: int = 2

    def __call__(self, sigma: Tensor, size: Size) -> Tensor:
        """Shifted times."""
        return static(sigma, size, math.exp(self.mu(size)))

    def mu(self, size: Size) -> float:
        """The logarithm of the factor for latents of ``size``."""
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)
