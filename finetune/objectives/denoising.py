"""The objective of a run: a process, and what the recipe refines of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finetune.objective import Draws, Noised, Prediction
from finetune.objectives.losses import Loss, l2
from finetune.objectives.noise import Noising
from finetune.objectives.process import Process
from finetune.objectives.times import Times
from finetune.objectives.weights import Weighting, even


def unchanged(answer: Tensor, noised: Noised) -> Tensor:
    """The answer itself: the base predicts what is asked."""
    return answer


@dataclass(frozen=True)
class Denoising:
    """Implements ``finetune.objective.Objective``. Without more than a process it is what the base was trained on.

    Args:
        process: from pictures to noise.
        times: which of it is trained.
        noise: what latents are spoiled with.
        weigh: how much a time counts.
        loss: what a difference costs.
        sampling, restate: as in ``Objective``.
    """

    process: Process
    times: Times = field(default_factory=Times)
    noise: Noising = field(default_factory=Noising)
    weigh: Weighting = even
    loss: Loss = l2
    sampling: Mapping[str, Any] = field(default_factory=dict)
    restate: Callable[[Tensor, Noised], Tensor] = unchanged

    @property
    def prediction(self) -> Prediction:
        """What is asked."""
        return self.process.prediction

    def spoil(self, clean: Tensor, draws: Draws, bias: Tensor | None = None) -> Noised:
        """Draw times and noise for ``clean`` [B, C, h, w] and mix them."""
        share = self.times(draws, self.process.steps, (clean.shape[-2], clean.shape[-1]), bias)
        asked, mixed = self.noise(clean, draws)
        return self.mixed(clean, self.process.timesteps(share).to(clean.device), asked, mixed)

    def mixed(self, clean: Tensor, timesteps: Tensor, asked: Tensor, mixed: Tensor | None = None) -> Noised:
        """The question at given times [B] and with given noise [B, C, h, w]; ``mixed`` where another is mixed in."""
        noisy = self.process.mix(clean, asked if mixed is None else mixed, timesteps)
        return Noised(noisy, timesteps, self.process.target(clean, asked, timesteps), self.weigh(timesteps))

    def error(self, answer: Tensor, noised: Noised) -> Tensor:
        """What each number of ``answer`` costs, float32 [B, C, h, w]; without weights."""
        return self.loss(answer.float() - noised.target.float(), noised.timesteps)
