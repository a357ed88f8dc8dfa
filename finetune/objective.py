"""The border of how a latent is spoiled and what is asked back. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from finetune.randomness import generator

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""What a denoiser answers, in diffusers' words; ``finetune.objectives.predictions`` has the formulas."""


class Noised(NamedTuple):
    """A question for the denoiser and its answer."""

    noisy: Tensor  # [B, C, h, w]  what the denoiser sees
    timesteps: Tensor  # [B]       how far along, in the denoiser's own unit
    target: Tensor  # [B, C, h, w] what it should say
    weight: Tensor  # [B] float32  how much each sample counts


@dataclass(frozen=True)
class Draws:
    """The randomness of B samples. Each has generators of its own, named by a purpose, its id and its draw.

    Attributes:
        seed: the run's.
        ids, numbers: as ``Batch.ids`` and ``Batch.draws``.
    """

    seed: int
    ids: Sequence[str]
    numbers: Sequence[int]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A fresh generator for every sample."""
        return [generator(self.seed, purpose, *name) for name in zip(self.ids, self.numbers, strict=True)]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 [B, *shape], on the CPU."""
        return torch.stack([torch.randn(*shape, generator=rng) for rng in self.generators(purpose)])

    def uniform(self, purpose: str) -> Tensor:
        """A number in [0, 1) for every sample, float64 [B], on the CPU."""
        return torch.cat([torch.rand(1, dtype=torch.float64, generator=rng) for rng in self.generators(purpose)])


class Objective(Protocol):
    """A way to spoil latents, and what an answer's error costs."""

    @property
    def prediction(self) -> Prediction:
        """What is asked."""
        ...

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Settings of diffusers' scheduler that must be sampled with, where they differ from the base's."""
        ...

    def spoil(self, clean: Tensor, draws: Draws, bias: Tensor | None = None) -> Noised:
        """Draw times and noise for ``clean`` [B, C, h, w] and mix them.

        Args:
            bias: of each sample's time towards noise, float [B], as ``finetune.objectives.times.tilted`` has it.
        """
        ...

    def error(self, answer: Tensor, noised: Noised) -> Tensor:
        """What each number of ``answer`` costs, float32 [B, C, h, w]; without weights."""
        ...

    def restate(self, answer: Tensor, noised: Noised) -> Tensor:
        """An answer of the untouched base [B, C, h, w] in the terms of ``prediction``."""
        ...
