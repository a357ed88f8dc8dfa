"""What checkpoints hold, whole on the host, a tensor at a time: all of them at once may fit on no device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.engines import Engine, Memory


def gather_weights(engine: Engine, parameters: Mapping[str, nn.Parameter], keep: bool) -> dict[str, Tensor]:
    """Copies of ``parameters``, whatever each process has of them. All must call.

    Args:
        keep: whether this process wants them; the others only help, and get none.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        with engine.whole([parameter]):
            if keep:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


@torch.no_grad()
def scatter_weights(engine: Engine, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Put ``gather_weights`` back. All processes must call, with the same values."""
    for name, parameter in parameters.items():
        with engine.whole([parameter], change=True):
            parameter.copy_(values[name])


def memory_of(engine: Engine, keep: bool) -> Memory:
    """The engine's ``memory``, on the host. All processes must call it; those without ``keep`` get nothing."""

    def memory(parameter: nn.Parameter) -> Mapping[str, Any]:
        held = engine.memory(parameter)
        if not keep:
            return {}
        return {what: value.cpu() if isinstance(value, Tensor) else value for what, value in held.items()}

    return memory
