"""Flow matching on straight lines (Lipman et al. 2022, https://arxiv.org/abs/2210.02747; Liu et al. 2022,
https://arxiv.org/abs/2209.03003): SD 3, Flux.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetune.objective import Prediction
from finetune.objectives.process import like
from finetune.objectives.shifts import Shift, unshifted


@dataclass(frozen=True)
class Flow:
    """The denoiser sees ``(1 - sigma) x0 + sigma eps`` and is asked for ``eps - x0``. Times are continuous.

    ``sigma`` is 1 for noise and is kept at 1 / ``steps`` at least, where the base's own table ends.

    Args:
        unit: the denoiser is told ``unit * sigma``: 1000, or 1.
        patch: latent cells along a side of an image token, for shifts that depend on their number.
        shift: of the times that the base's own scheduler samples at.
    """

    unit: float = 1000.0
    patch: int = 2
    shift: Shift = unshifted
    steps: int = 1000

    @property
    def prediction(self) -> Prediction:
        """``eps - x0``."""
        return "flow_prediction"

    def timesteps(self, share: Tensor) -> Tensor:
        """``unit * sigma``, float32 [B]."""
        return (self.unit * share.clamp(1 / self.steps, 1)).float()

    def progress(self, timesteps: Tensor) -> Tensor:
        """``sigma``."""
        return (timesteps.double() / self.unit).float()

    def mix(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``(1 - sigma) x0 + sigma eps``."""
        sigma = self.progress(timesteps)
        return like(1 - sigma, clean) * clean + like(sigma, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``eps - x0``, whatever the time."""
        return noise - clean
