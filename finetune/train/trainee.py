"""What is wrapped for several processes: one module with all that trains, and the loss as its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.batch import Batch


class Losses(Protocol):
    """A ``NamedTuple`` of scalars: ``total`` is made small, the other fields are logged."""

    @property
    def total(self) -> Tensor:
        """What is differentiated."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


class Trainee(nn.Module):
    """The single module that is wrapped for several processes.

    DDP, FSDP and ZeRO work by intercepting one module's ``forward``. So all weights that receive gradients live in
    this module, and the whole loss is computed inside its ``forward``. Networks that train are put into ``train()``.

    Args:
        also: frozen networks that belong to it, where weights are dealt out to the processes.
    """

    def __init__(
        self,
        networks: nn.ModuleDict,
        loss: Callable[[Batch], Tensor | Losses],
        penalty: Callable[[], Tensor | None] = lambda: None,
        also: Sequence[str] = (),
    ) -> None:
        super().__init__()
        trained = {name: part for name, part in networks.items() if any(p.requires_grad for p in part.parameters())}
        for network in trained.values():
            network.train()
        self.networks = nn.ModuleDict(trained | {name: networks[name] for name in also if name in networks})
        self._loss, self._penalty = loss, penalty

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss under "total" and its parts under their names, float32 scalars."""
        loss = self._loss(batch)
        parts = {"total": loss} if isinstance(loss, Tensor) else loss._asdict()
        if (penalty := self._penalty()) is not None:
            parts |= {"total": parts["total"] + penalty, "penalty": penalty}
        return {name: value.float() for name, value in parts.items()}


def place(networks: nn.ModuleDict, device: torch.device, but: Container[str] = ()) -> None:
    """Move ``networks`` to the device, ``but`` not those that the engine moves itself."""
    for name, network in networks.items():
        if name not in but:
            network.to(device)
