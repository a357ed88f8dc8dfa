"""An exponential moving average of the trained weights (Polyak & Juditsky 1992; as diffusion models use it)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.config.schema import EmaConfig
from finetune.errors import UserError


class Ema:
    """``average <- d * average + (1 - d) * weight`` after every update, in float32; only what is trained.

    Args:
        parameters: what is averaged, by canonical name. The average begins as a copy of them.
    """

    def __init__(self, config: EmaConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self._config = config
        self._parameters = dict(parameters)
        self._average = {name: value.detach().float().clone() for name, value in parameters.items()}

    def decay(self, step: int) -> float:
        """The ``d`` of the update that makes ``step`` of them, counted from 1.

        While it warms up, ``(1 + step) / (10 + step)``: early weights, which are far off, are soon forgotten.
        """
        return min(self._config.decay, (1 + step) / (10 + step)) if self._config.warmup else self._config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` updates."""
        weight = 1.0 - self.decay(step)
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].detach().float(), weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the networks hold the average; afterwards the trained weights again, bit for bit."""
        trained = {name: parameter.data for name, parameter in self._parameters.items()}
        self.keep()
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = trained[name]

    def keep(self) -> None:
        """Leave the average in the networks: what the end of a run exports."""
        for name, parameter in self._parameters.items():
            parameter.data = self._average[name].to(parameter.device, parameter.dtype, copy=True)

    def state(self) -> dict[str, Tensor]:
        """The averages by canonical name."""
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put ``state`` back.

        Raises:
            UserError: it has other names or shapes.
        """
        if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in self._average.items()}:
            raise UserError("the moving average in the checkpoint is of other parameters than this recipe trains")
        for name, value in state.items():
            self._average[name].copy_(value)
