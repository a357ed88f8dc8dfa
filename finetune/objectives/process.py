"""What a base model was trained to undo."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from finetune.objective import Prediction


class Process(Protocol):
    """A way from pictures to noise. Times are in the denoiser's own unit, [B]."""

    @property
    def prediction(self) -> Prediction:
        """What its denoiser answers."""
        ...

    @property
    def steps(self) -> int:
        """How many timesteps stand between picture and noise where they are counted."""
        ...

    def timesteps(self, share: Tensor) -> Tensor:
        """Times at which a share in (0, 1), float64 [B], of the way to noise has been gone."""
        ...

    def progress(self, timesteps: Tensor) -> Tensor:
        """The share of the way to noise that has been gone, float32 [B]."""
        ...

    def mix(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser sees of ``clean`` [B, C, h, w]."""
        ...

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What it should answer, [B, C, h, w]."""
        ...


def like(values: Tensor, latents: Tensor) -> Tensor:
    """``values`` [B] shaped to multiply ``latents`` [B, ...] of any number of axes, in their dtype."""
    return values.view(-1, *(1,) * (latents.ndim - 1)).to(latents.dtype)
