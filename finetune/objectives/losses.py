"""What a difference costs. All of them are ``d^2`` or ``2 |d|`` up to a constant where they are far from their turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objectives.ddpm import DDPM
from finetune.objectives.process import Process, like

Loss = Callable[[Tensor, Tensor], Tensor]
"""Differences [B, ...] and times [B] in the denoiser's unit -> costs, [B, ...]."""

Turn = Callable[[Tensor], Tensor]
"""Times [B] -> where a loss turns from a parabola into a line, float32 [B]."""


def l2(difference: Tensor, timesteps: Tensor) -> Tensor:
    """``d^2``."""
    return difference.square()


def l1(difference: Tensor, timesteps: Tensor) -> Tensor:
    """``|d|``."""
    return difference.abs()


@dataclass(frozen=True)
class Turning:
    """A parabola near zero and a line far from it; ``turn`` says where, time by time."""

    shape: Callable[[Tensor, Tensor], Tensor]
    turn: Turn

    def __call__(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        """The cost of every number."""
        return self.shape(difference, like(self.turn(timesteps), difference))


def huber(d: Tensor, c: Tensor) -> Tensor:
    """``d^2`` up to c, ``2 c |d| - c^2`` beyond: twice Huber's own, so that it begins as l2."""
    return torch.where(d.abs() <= c, d.square(), 2 * c * d.abs() - c.square())


def pseudo_huber(d: Tensor, c: Tensor) -> Tensor:
    """``2 c (sqrt(d^2 + c^2) - c)``, written so that nothing cancels: what kohya's trainers call huber."""
    return 2 * c * d.square() / ((d.square() + c.square()).sqrt() + c)


def smooth_l1(d: Tensor, c: Tensor) -> Tensor:
    """``2 (sqrt(d^2 + c^2) - c)``: the pseudo-Huber loss over c, so that its line does not flatten with c."""
    return 2 * d.square() / ((d.square() + c.square()).sqrt() + c)


def constant(timesteps: Tensor, delta: float) -> Tensor:
    """The same turn at all times."""
    return torch.full((len(timesteps),), delta, device=timesteps.device)


def exponential(timesteps: Tensor, process: Process, delta: float) -> Tensor:
    """``delta^(share of the way to noise)``: from 1 to delta (Khrapov et al. 2024, https://arxiv.org/abs/2403.16728)."""
    return delta ** process.progress(timesteps)


def by_snr(timesteps: Tensor, process: DDPM, delta: float) -> Tensor:
    """``(1 - delta) / (1 + sigma)^2 + delta`` with ``sigma = 1 / sqrt(SNR)`` (the same paper)."""
    return (1 - delta) / (1 + process.snr(timesteps).rsqrt()).square() + delta
