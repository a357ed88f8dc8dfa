"""Processes and devices: how a run begins on however many there are.

Everything else asks a ``Processes`` (who am I, do all agree, run this once) or its ``Engine`` (forward, backward,
step).
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from finetune import waiting
from finetune.config.schema import TrainConfig
from finetune.engines import Engine, fsdp_settings, zero_settings
from finetune.engines.fsdp import Fsdp2
from finetune.engines.fsdp_settings import FsdpSettings
from finetune.engines.replicated import Replicated
from finetune.engines.zero import Zero
from finetune.errors import GuardError, Stopped, UserError
from finetune.launcher import asked_processes, local_world, set_threads

T = TypeVar("T")

_OLD_NAMES = r"`(broadcast_buffers|torch\.distributed\.(all_gather_into|reduce_scatter)_tensor)` is deprecated"
"""Accelerate, DeepSpeed and FSDP2 call torch by them; said by each process, again and again."""

JOINING = datetime.timedelta(minutes=10)  # in which all must have come; later nobody's patience ends (``waiting``)


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

    def __init__(
        self, accelerator: Accelerator, threads: int, precision: str = "no", fsdp: FsdpSettings | None = None
    ) -> None:
        self._accelerator = accelerator
        self._precision = precision
        self._fsdp = fsdp
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.local_rank: int = accelerator.local_process_index
        self.local_world = local_world()
        self.device: torch.device = accelerator.device
        self.threads = threads
        first = self.rank - self.local_rank
        local = range(first, first + self.local_world)
        self._watch = waiting.join(self.rank, self.world, local) if self.world > 1 else None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and speaks."""
        return self.rank == 0

    def describe(self) -> str:
        """What this run really is, in a line: ``2 processes (DDP, gloo), cpu, 1 thread each, float32``."""
        engine = f" ({self.engine_name}, {self._accelerator.state.backend})" if self._shares else ""
        precision = {"no": "float32"}.get(self._precision, self._precision)
        each = _count(self.threads, "thread") + (" each" if self.world > 1 else "")
        return f"{_count(self.world, 'process')}{engine}, {self._device_name()}, {each}, {precision}"

    def say(self, text: str) -> None:
        """Print ``text`` once, from the main process."""
        if self.is_main:
            print(text, flush=True)

    def doing(self, text: str) -> None:
        """Say what this process works on: what others are told that wait for it."""
        if self._watch:
            self._watch.doing(text)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            with self._waiting("barrier"):
                torch.distributed.barrier()

    def gather(self, values: Tensor) -> Tensor:
        """Every process's ``values`` [...], stacked by rank, [world, ...] on the CPU. All must call, with one shape."""
        if self.world == 1:
            return values[None].cpu()
        parts = [torch.empty_like(values) for _ in range(self.world)]
        with self._waiting("gather"):
            torch.distributed.all_gather(parts, values.contiguous())
            return torch.stack(parts).cpu()

    def gather_object(self, value: T) -> list[T]:
        """Every process's ``value``, by rank. All must call."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        with self._waiting("gather_object"):
            torch.distributed.all_gather_object(parts, value)
        return parts

    def broadcast(self, value: T) -> T:
        """The main process's ``value``. All must call; the others' argument is ignored."""
        if self.world == 1:
            return value
        parts: list[Any] = [value if self.is_main else None]
        with self._waiting("broadcast"):
            torch.distributed.broadcast_object_list(parts, src=0)
        return parts[0]

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` holds on every process."""
        return all(self.gather_object(flag))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some process."""
        return any(self.gather_object(flag))

    def most(self, number: int) -> int:
        """The largest ``number`` of any process. All must call."""
        if self.world == 1:
            return number
        held = torch.tensor(number, device=self.device)
        with self._waiting("most"):
            torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
            return int(held)

    def on_main(self, function: Callable[[], T], doing: str) -> T:
        """Run ``function``, which is ``doing`` that, on the main process alone and give its result to all.

        What it raises is raised on all of them, so that none waits for one that has failed.
        """
        if self.world == 1:
            return function()
        result: Any = None
        failure: Exception | None = None
        if self.is_main:
            self.doing(doing)
            try:
                result = function()
            except Exception as error:
                failure = error
        result, told = self.broadcast((result, _portable(failure)))
        if told is not None:
            raise failure or told
        return result

    @property
    def engine_name(self) -> str:
        """What people call the engine: "DDP", "DeepSpeed ZeRO-3", "FSDP2"."""
        if self._fsdp:
            return "FSDP2"
        return f"DeepSpeed ZeRO-{self._zero_stage}" if self._zero_stage else "DDP"

    @property
    def loading_device(self) -> torch.device:
        """Where networks are put that train. For an engine that cuts weights it is the host, from where one weight or
        block after the other is moved and cut: whole networks may be larger than the device.
        """
        return torch.device("cpu") if self.shards_weights else self.device

    @property
    def shards_weights(self) -> bool:
        """Whether the engine will give each process only a piece of every weight."""
        return self._zero_stage == 3 or self._fsdp is not None

    def engine(
        self,
        trainee: nn.Module,
        optimizer: torch.optim.Optimizer,
        phased: bool = False,
        outside: Sequence[nn.Parameter] = (),
    ) -> Engine:
        """Make ``trainee`` and its optimizer work across the processes. Once per run.

        Args:
            phased: some weights have no part in the loss of some steps, which processes then have to find out.
            outside: parameters that the loss reads outside of the modules that hold them.

        Raises:
            GuardError: the engine is not the one that was asked for.
        """
        autocast = torch.bfloat16 if self._precision == "bf16" else None
        if self._fsdp:
            sharded = Fsdp2(self._accelerator, trainee, optimizer, autocast, self._fsdp)
            waiting.wait_for_ever()  # it has made groups of its own
            return sharded
        if self._zero_stage:
            engine = Zero(self._accelerator, trainee, optimizer, autocast, outside)
            waiting.wait_for_ever()  # so has DeepSpeed
            if engine.stage != self._zero_stage:
                raise GuardError(f"ZeRO-{self._zero_stage} was asked for, DeepSpeed runs stage {engine.stage}")
            return engine
        return Replicated(self._accelerator, trainee, optimizer, phased)

    def _leave(self) -> None:
        """Tell the others and close the connections in order: gloo aborts a process that ends with open ones."""
        failure = getattr(sys, "last_value", None)
        if self._watch:
            self._watch.leave(failure)
        if torch.distributed.is_initialized() and (failure is None or self.device.type == "cpu"):
            torch.distributed.destroy_process_group()  # NCCL would wait for the others

    def _waiting(self, where: str) -> AbstractContextManager[None]:
        return self._watch.waiting(where) if self._watch else nullcontext()

    @property
    def _shares(self) -> bool:
        return self.world > 1 or self.engine_name != "DDP"

    @property
    def _zero_stage(self) -> int:
        """0 without DeepSpeed."""
        plugin = self._accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage) if plugin else 0

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def start(train: TrainConfig | None = None) -> Processes:
    """Join this run's processes, choose a device and a number of threads, and say what came of it.

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
    warnings.filterwarnings("ignore", _OLD_NAMES, FutureWarning)
    plugin = zero_settings.plugin(train, on_cpu) if zero_settings.asked() else None
    fsdp = fsdp_settings.settings(train) if fsdp_settings.asked() else None
    handlers = []
    if "LOCAL_RANK" in os.environ:  # started by a launcher that starts several
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=JOINING))
    accelerator = Accelerator(
        # unless told, accelerate takes two processes without GPU for two runs, and averages nothing; told so, it would
        # leave out DeepSpeed without a word
        cpu=on_cpu and plugin is None,
        mixed_precision="no" if plugin or fsdp else train.mixed_precision,  # of weights, were these to hear of it
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    if plugin:
        plugin.dschf = None  # by which transformers would load networks in pieces, and those of the report too
    torch.set_num_threads(threads)  # accelerate sets its own number while it starts
    processes = Processes(accelerator, threads, train.mixed_precision, fsdp)
    atexit.register(processes._leave)
    _require_what_was_asked(processes)
    if processes.world > 1:
        processes.barrier()  # connects them: NCCL does so at the first call, with a timeout
        waiting.wait_for_ever()
    processes.say(processes.describe())
    return processes


def _forget_earlier_runs() -> None:
    """Accelerate keeps its settings for the life of the process; a second run in one process has its own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if not torch.distributed.is_initialized():
        PartialState._reset_state()


def _require_what_was_asked(processes: Processes) -> None:
    if zero_settings.asked() and processes._accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError(f"DeepSpeed asked for, but this is {processes.describe()}; start it with a launcher")
    if processes._fsdp and not torch.distributed.is_initialized():
        raise UserError(f"FSDP2 asked for, but this is {processes.describe()}; start it with a launcher")
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
