"""One process, or many that each hold all weights (DDP)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from finetune.engines import Memories, Reached, came_of, put
from finetune.errors import GuardError

FLAT = 128  # MiB of gradients that travel in one call; of more than that, parts travel while backward goes on


class Replicated:
    """Every process holds all weights and the optimizer's memory of them, and gradients are averaged.

    Those of an adapter, hundreds of small tensors, travel as one flat tensor per update.

    Args:
        phased: some weights have no part in the loss of some steps, which processes then have to find out.
    """

    sharded = False

    def __init__(
        self, accelerator: Accelerator, trainee: nn.Module, optimizer: Optimizer, phased: bool = False
    ) -> None:
        self._accelerator = accelerator
        self._plain = optimizer
        trained = sum(parameter.nbytes for group in optimizer.param_groups for parameter in group["params"])
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            # torch's own choice for 25: at first 1 MiB, then 25 at a time
            bucket_cap_mb=FLAT if trained <= FLAT * 2**20 else 25,
            gradient_as_bucket_view=True,  # gradients are parts of what travels, not copied into it
            broadcast_buffers=False,  # they are constants: tables of positions
            find_unused_parameters=phased,
        )
        self._trainee, self._optimizer = accelerator.prepare(trainee, optimizer)
        if accelerator.num_processes > 1 and not isinstance(self._trainee, DistributedDataParallel):
            raise GuardError("the processes would not share their gradients: accelerate has wrapped nothing")
        self.scales_loss = accelerator.scaler is not None

    @property
    def boundary(self) -> bool:
        """Whether accelerate exchanges gradients in this micro-step."""
        return self._accelerator.sync_gradients

    @property
    def optimizer(self) -> Optimizer:
        """As it was given."""
        return self._plain

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around one micro-step, as accelerate counts them."""
        with self._accelerator.accumulate(self._trainee):
            yield

    def forward(self, *inputs: Any) -> Any:
        """Call the module through DDP, where there is one."""
        return self._trainee(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add gradients; accelerate divides them and scales those of float16."""
        self._accelerator.backward(loss)

    def rest(self, groups: frozenset[str]) -> None:
        """Take away the gradients of these groups: optimizers pass over weights without one."""
        for group in self._plain.param_groups:
            if group["name"] in groups:
                for parameter in group["params"]:
                    parameter.grad = None  # optimizers pass over weights without one

    def reached(self, parameters: Sequence[nn.Parameter]) -> list[Reached]:
        """What came of each, read from its gradient."""
        return [came_of(parameter.grad) for parameter in parameters]

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, max_value: float | None = None) -> Tensor:
        """Clip the gradients, which are the same on every process."""
        norm = self._accelerator.clip_grad_norm_(parameters, max_norm if max_value is None else math.inf)
        if max_value is not None:
            nn.utils.clip_grad_value_(parameters, max_value)
        return torch.as_tensor(norm)

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def whole(self, parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[None]:
        """Weights are whole everywhere."""
        return nullcontext()

    def drawing(self) -> AbstractContextManager[None]:
        """Every process may run the networks as they are."""
        return nullcontext()

    def release(self) -> None:
        """Nothing to give back."""
        return

    def memory(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The optimizer's own."""
        return self._plain.state.get(parameter, {})

    def remember(self, memories: Memories) -> None:
        """Put it into the optimizer."""
        put(self._plain, memories)

    def scaler_state(self) -> dict[str, float]:
        """Of accelerate's float16 scaler."""
        return dict(self._accelerator.scaler.state_dict()) if self.scales_loss else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put it back, where there is a scaler."""
        if self.scales_loss and state:
            self._accelerator.scaler.load_state_dict(state)
