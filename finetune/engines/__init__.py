"""What happens between a batch and moved weights: the ``Engine`` that a run has, whatever its processes hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Memory = Callable[[nn.Parameter], Mapping[str, Any]]
"""What an optimizer remembers of a parameter, whole."""
Memories = Mapping[nn.Parameter, Mapping[str, Any]]


class Reached(IntEnum):
    """What came of a parameter in a backward pass."""

    NOT = 0  # no gradient: the loss does not depend on it
    ZERO = 1
    MOVED = 2


class Engine(Protocol):
    """One module and its optimizer, wrapped for the processes of a run. All processes make the same calls."""

    sharded: bool
    """Whether each process holds a piece of every weight, gathered where a network runs: processes then must run every
    network equally often."""
    scales_loss: bool
    """True under float16, where gradients may overflow and the scale then shrinks."""

    @property
    def boundary(self) -> bool:
        """True in the micro-step that ends an accumulation."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself, unwrapped."""
        ...

    def accumulating(self) -> AbstractContextManager[None]:
        """Around one micro-step: gradients are exchanged between processes only where an accumulation ends."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """Call the wrapped module, under mixed precision where that was asked for."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add ``loss``'s gradients, divided by the number of micro-steps that accumulate."""
        ...

    def rest(self, groups: frozenset[str]) -> None:
        """Leave out of this update the optimizer's groups of these names, decay included."""
        ...

    def reached(self, parameters: Sequence[nn.Parameter]) -> list[Reached]:
        """What came of ``parameters``, between the last backward pass of an update and its step."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, max_value: float | None = None) -> Tensor:
        """Scale gradients down to ``max_norm`` where they are longer, and return their norm before, a scalar.

        With ``max_value``, cut each of their numbers to that size instead. Either acts on true gradients: those of
        float16 have been divided by the loss scale by then.
        """
        ...

    def step(self) -> None:
        """Move the weights and forget the gradients. Under float16 weights stay where a gradient overflowed."""
        ...

    def whole(self, parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[None]:
        """Inside, ``parameters`` have all their numbers, wherever they are kept.

        Args:
            change: whether they are given other values inside, the same ones on every process.
        """
        ...

    def drawing(self) -> AbstractContextManager[None]:
        """Inside, the networks are whole and each process runs them as it likes."""
        ...

    def release(self) -> None:
        """Give the networks back, whole and for good. Nothing trains any more."""
        ...

    def memory(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """What the optimizer remembers of ``parameter``, each tensor whole."""
        ...

    def remember(self, memories: Memories) -> None:
        """Put ``memory`` back, that of each parameter.

        Raises:
            UserError: the optimizer, as it is wrapped, cannot hold it.
        """
        ...

    def scaler_state(self) -> dict[str, float]:
        """Numbers of the float16 loss scaler; empty without one."""
        ...

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put ``scaler_state`` back."""
        ...


def put(optimizer: Optimizer, memories: Memories) -> None:
    """Let a plain optimizer remember ``memories``."""
    homes = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, memory in memories.items():
        for what, value in memory.items():
            device = count_device(homes[parameter], parameter) if what == "step" else parameter.device
            optimizer.state[parameter][what] = value.to(device, copy=True) if isinstance(value, Tensor) else value


def count_device(group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Where an optimizer's count of steps lives: on the host, but for kernels that read it beside the parameter."""
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def came_of(gradient: Tensor | None) -> Reached:
    """What a whole gradient says."""
    if gradient is None:
        return Reached.NOT
    return Reached.MOVED if bool(gradient.count_nonzero()) else Reached.ZERO
