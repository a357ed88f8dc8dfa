"""Which times are trained, and how often: everything is a curve through which uniform numbers are sent.

A *share* is how much of the way from picture (0) to noise (1) has been gone. A distribution of shares is its quantile
function, so that ranges, biases and stratified draws work with all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objective import Draws
from finetune.objectives.shifts import Shift, Size, unshifted
from finetune.randomness import derive

Quantiles = Callable[[Tensor], Tensor]
"""Numbers in (0, 1) to shares, rising, float64."""

EDGE = 1e-6  # of the part of a uniform number that is kept free, so that rounding cannot move it into the next
GOLDEN = (math.sqrt(5) - 1) / 2


def uniform(u: Tensor) -> Tensor:
    """Every share equally often."""
    return u


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """``sigmoid(mean + std n)``, n being standard normal (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section
    3.1). A positive mean is more noise.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Heavy in the middle where ``scale`` is positive, at the ends where it is negative (the same section).

    Args:
        scale: from -1 to 1.75, between which the curve rises.
    """
    return u + scale * (u - torch.sin(math.pi / 2 * u).square())


def independent(draws: Draws, steps: int) -> Tensor:
    """A number in (0, 1) for every sample, float64 [B]: first which of ``steps`` equal parts, then where in it."""

    def one(rng: torch.Generator) -> Tensor:
        part = torch.randint(steps, (1,), generator=rng)
        return (part + EDGE + (1 - 2 * EDGE) * torch.rand(1, dtype=torch.float64, generator=rng)) / steps

    return torch.cat([one(rng) for rng in draws.generators("timestep")])


def stratified(draws: Draws, steps: int) -> Tensor:
    """As ``independent``, but draws that follow each other are spread evenly: draw ``n`` is at ``start + n golden``.

    The golden ratio's multiples fill the circle about evenly however many are taken, so neither the batch nor the
    processes need be known. A class image has the number of the subject's picture that it is drawn with.
    """
    start = derive(draws.seed, "timesteps start") / 2**63
    places = torch.tensor([(start + number * GOLDEN) % 1 for number in draws.numbers], dtype=torch.float64)
    return places.clamp(EDGE / steps, 1 - EDGE / steps)


def tilted(u: Tensor, bias: Tensor) -> Tensor:
    """Uniform numbers [B] as the highest of ``1 + bias`` of them, or the lowest of ``1 - bias`` for a negative bias."""
    power = 1 / (1 + bias.double().abs())
    return torch.where(bias >= 0, u**power, 1 - (1 - u) ** power)


@dataclass(frozen=True)
class Times:
    """How shares are drawn.

    Args:
        curve: their distribution.
        low, high: the range; of the distribution what lies outside is cut away.
        shift: moves them before the range is looked at.
        draw: where uniform numbers come from.
    """

    curve: Quantiles = uniform
    low: float = 0.0
    high: float = 1.0
    shift: Shift = unshifted
    draw: Callable[[Draws, int], Tensor] = independent

    def __call__(self, draws: Draws, steps: int, size: Size, bias: Tensor | None = None) -> Tensor:
        """A share for every sample, float64 [B], on the CPU.

        Args:
            steps: timesteps that the way is counted in.
            size: height and width of the latents.
            bias: as in ``tilted``, float [B].
        """
        u = self.draw(draws, steps)
        if bias is not None:
            u = tilted(u, bias.cpu())
        low, high = _ends(self, size)
        return self.shift(self.curve(low + (high - low) * u), size)


@functools.lru_cache(maxsize=1024)
def _ends(times: Times, size: Size) -> tuple[float, float]:
    """Between which uniform numbers the range lies."""
    return (
        _below(times, size, times.low) if times.low > 0 else 0.0,
        _below(times, size, times.high) if times.high < 1 else 1.0,
    )


def _below(times: Times, size: Size, share: float) -> float:
    """How much of the distribution lies below ``share``: the curve inverted by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at = times.shift(times.curve(torch.tensor([middle], dtype=torch.float64)), size)
        low, high = (middle, high) if float(at) < share else (low, middle)
    return (low + high) / 2
