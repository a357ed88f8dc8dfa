"""What optimizers over lists of tensors share: which weights move, and what is remembered of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = MutableMapping[Tensor, dict[str, Any]]


def moving(group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and those gradients. The others rest, decay included."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    return parameters, [parameter.grad for parameter in parameters]


def remembered(
    state: State, parameters: Sequence[Tensor], what: str, begin: Callable[[Tensor], Tensor] = torch.zeros_like
) -> list[Tensor]:
    """What is kept of each parameter under the name ``what``; ``begin`` makes it where nothing is kept yet."""
    for parameter in parameters:
        if what not in state[parameter]:
            state[parameter][what] = begin(parameter.detach())
    return [state[parameter][what] for parameter in parameters]
