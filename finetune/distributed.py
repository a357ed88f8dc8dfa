"""Processes and devices: the one file that knows accelerate's insides.

Everything else asks a ``Processes`` (who am I, do all agree, run this once) or an ``Engine`` (forward, backward, step).
"""

from __future__ import annotations

import atexit
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetune.config.schema import TrainConfig
from finetune.errors import GuardError, Stopped, UserError
from finetune.launcher import asked_processes, local_world, set_threads

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=2)  # others wait while the main process draws class images


class Processes:
    """The processes of one run, seen from one of them.

    Attributes:
        rank: this process's number among all; 0 is the main one, which writes files.
        world: how many there are.
        local_rank: this process's number on its machine.
        local_world: how many share this machine.
        device: where this process computes.
        threads: CPU threads of this process.
    """

    def __init__(self, accelerator: Accelerator, threads: int) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.local_rank: int = accelerator.local_process_index
        self.local_world = local_world()
        self.device: torch.device = accelerator.device
        self.threads = threads

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and speaks."""
        return self.rank == 0

    def describe(self) -> str:
        """What this run really is, in a line: ``2 processes (DDP, gloo), cpu, 1 thread each, float32``."""
        engine = f" (DDP, {self._accelerator.state.backend})" if self.world > 1 else ""
        precision = {"no": "float32"}.get(self._accelerator.mixed_precision, self._accelerator.mixed_precision)
        each = _count(self.threads, "thread") + (" each" if self.world > 1 else "")
        return f"{_count(self.world, 'process')}{engine}, {self._device_name()}, {each}, {precision}"

    def say(self, text: str) -> None:
        """Print ``text`` once, from the main process."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()

    def gather(self, values: Tensor) -> Tensor:
        """Every process's ``values`` [...], stacked by rank, [world, ...]. All must call, with one shape."""
        if self.world == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def gather_object(self, value: T) -> list[T]:
        """Every process's ``value``, by rank. All must call."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, value)
        return parts

    def broadcast(self, value: T) -> T:
        """The main process's ``value``. All must call; the others' argument is ignored."""
        if self.world == 1:
            return value
        parts: list[Any] = [value if self.is_main else None]
        torch.distributed.broadcast_object_list(parts, src=0)
        return parts[0]

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` holds on every process."""
        return all(self.gather_object(flag))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some process."""
        return any(self.gather_object(flag))

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the main process alone and give its result to all.

        What it raises is raised on all of them, so that none waits for one that has failed.
        """
        if self.world == 1:
            return function()
        result: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                failure = error
        result, told = self.broadcast((result, _portable(failure)))
        if told is not None:
            raise failure or told
        return result

    def engine(self, trainee: nn.Module, optimizer: torch.optim.Optimizer, phased: bool = False) -> Engine:
        """Make ``trainee`` and its optimizer work across the processes. Once per run.

        Args:
            phased: some weights have no part in the loss of some steps, which processes then have to find out.
        """
        if phased:
            self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return Engine(self._accelerator, trainee, optimizer)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


class Engine:
    """One module and its optimizer, wrapped: what happens between a batch and moved weights."""

    def __init__(self, accelerator: Accelerator, trainee: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator = accelerator
        self._plain = optimizer
        self._trainee, self._optimizer = accelerator.prepare(trainee, optimizer)
        if accelerator.num_processes > 1 and not isinstance(self._trainee, DistributedDataParallel):
            raise GuardError("the processes would not share their gradients: accelerate has wrapped nothing")

    @property
    def boundary(self) -> bool:
        """True in the micro-step that ends an accumulation."""
        return self._accelerator.sync_gradients

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around one micro-step: gradients are exchanged between processes only where an accumulation ends."""
        with self._accelerator.accumulate(self._trainee):
            yield

    def forward(self, *inputs: Any) -> Any:
        """Call the wrapped module, under mixed precision where that was asked for."""
        return self._trainee(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add ``loss``'s gradients, divided by the number of micro-steps that accumulate."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, max_value: float | None = None) -> Tensor:
        """Scale gradients down to ``max_norm`` where they are longer, and return their norm before, a scalar.

        With ``max_value``, cut each of their numbers to that size instead. Either acts on true gradients: those of
        float16 have been divided by the loss scale by then.
        """
        norm = self._accelerator.clip_grad_norm_(parameters, max_norm if max_value is None else math.inf)
        if max_value is not None:
            nn.utils.clip_grad_value_(parameters, max_value)
        return torch.as_tensor(norm)

    def step(self) -> None:
        """Move the weights and forget the gradients. Under float16 weights stay where a gradient overflowed."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, unwrapped."""
        return self._plain

    @property
    def scales_loss(self) -> bool:
        """True under float16, where gradients may overflow and the scale then shrinks."""
        return self._accelerator.scaler is not None

    def scaler_state(self) -> dict[str, float]:
        """Numbers of the float16 loss scaler; empty without one."""
        return dict(self._accelerator.scaler.state_dict()) if self.scales_loss else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put ``scaler_state`` back."""
        if self.scales_loss and state:
            self._accelerator.scaler.load_state_dict(state)


def start(train: TrainConfig | None = None, patience: datetime.timedelta = PATIENCE) -> Processes:
    """Join this run's processes, choose a device and a number of threads, and say what came of it.

    Args:
        patience: how long one of them waits for the others.

    Raises:
        UserError: what was asked for is not what can be had: fewer processes than the launcher was told, float16
            without a GPU.
    """
    train = train or TrainConfig()
    threads = set_threads(train.threads)
    on_cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.mixed_precision == "fp16" and on_cpu:
        raise UserError("train.mixed_precision is 'fp16', which needs a GPU; on a CPU use 'no' or 'bf16'")
    _forget_earlier_runs()
    handlers = []
    if "LOCAL_RANK" in os.environ:  # started by a launcher that starts several
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=patience))
    accelerator = Accelerator(
        cpu=on_cpu,  # unless told, accelerate takes two processes without GPU for two runs, and averages nothing
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        kwargs_handlers=handlers,
    )
    torch.set_num_threads(threads)  # accelerate sets its own number while it starts
    processes = Processes(accelerator, threads)
    atexit.register(_leave)
    _require_what_was_asked(processes)
    processes.say(processes.describe())
    return processes


def _forget_earlier_runs() -> None:
    """Accelerate keeps its settings for the life of the process; a second run in one process has its own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if not torch.distributed.is_initialized():
        PartialState._reset_state()


def _leave() -> None:
    """Close the connections in order: gloo aborts a process that ends with open ones."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _require_what_was_asked(processes: Processes) -> None:
    asked = asked_processes()
    if asked is not None and asked != processes.world:
        raise UserError(
            f"{_count(asked, 'process')} asked for, but only {processes.world} started; "
            "on CPU use `accelerate launch --config_file launch/accelerate/cpu-2.yaml` or `torchrun --nproc_per_node N`"
        )


def _portable(failure: Exception | None) -> Exception | None:
    """An error that can travel: one of ours as it is, any other as its words."""
    if failure is None or isinstance(failure, UserError | GuardError | Stopped):
        return failure
    return RuntimeError(f"the main process failed: {type(failure).__name__}: {failure}")


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"
