"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): the one file that knows its insides.

Stage 1 deals the optimizer's memory out to the processes, stage 2 gradients too, stage 3 also the weights. DeepSpeed
lays the weights of an optimizer's group end to end and gives each process a stretch of that line, *flat* below, to
which the optimizer is then applied. What a run does in between is the same as everywhere: gradients are checked and
clipped before the step, groups rest, and what is saved goes by the parameters' own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from finetune.engines import Memories, Reached, count_device
from finetune.engines.pieces import clip_pieces
from finetune.errors import GuardError, UserError


class Zero:
    """An ``Engine`` under ZeRO.

    Args:
        accelerator: made with ``zero_settings.plugin``.
        trainee, optimizer: wrapped once; the optimizer's groups have names.
        autocast: of the forward pass, None for float32.
        outside: parameters that the loss reads outside of the modules that hold them.
    """

    scales_loss = False

    def __init__(
        self,
        accelerator: Accelerator,
        trainee: nn.Module,
        optimizer: Optimizer,
        autocast: torch.dtype | None,
        outside: Sequence[nn.Parameter] = (),
    ) -> None:
        import deepspeed

        self._steps = accelerator.gradient_accumulation_steps
        self._done = 0  # micro-steps of the update
        self._plain = optimizer
        self._names = [group["name"] for group in optimizer.param_groups]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._group_of = {
            parameter: number for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        self._arrived: set[nn.Parameter] = set()
        for parameter in trained:
            parameter.register_hook(self._note(parameter))
        if autocast is not None:  # inside the engine, which switches off what is around it
            trainee.forward = torch.autocast(accelerator.device.type, autocast)(trainee.forward)  # type: ignore[method-assign]
        self._trainee = trainee
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            _cut(trainee, accelerator)
        self._engine, _ = accelerator.prepare(trainee, optimizer)
        if type(self._engine) is not deepspeed.DeepSpeedEngine:
            raise GuardError(f"DeepSpeed was asked for, accelerate has made a {type(self._engine).__name__}")
        self._zero = self._engine.optimizer
        self.stage = int(self._engine.zero_optimization_stage())
        self.sharded = self.stage == 3
        if self.sharded:
            for parameter in outside:
                deepspeed.zero.register_external_parameter(trainee, parameter)
        self._resting: frozenset[str] = frozenset()
        self._left: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._pass_over)
        optimizer.register_step_post_hook(self._return)

    @property
    def boundary(self) -> bool:
        """Whether this is the last micro-step of the update."""
        return self._done == self._steps

    @property
    def optimizer(self) -> Optimizer:
        """As it was given; its parameters are this process's stretches by now."""
        return self._plain

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Count one micro-step."""
        self._done = self._done % self._steps + 1
        yield

    def forward(self, *inputs: Any) -> Any:
        """Call the module through DeepSpeed, told whether an accumulation ends."""
        self._engine.set_gradient_accumulation_boundary(self.boundary)
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add gradients; DeepSpeed divides them and sends each to its process."""
        self._engine.backward(loss)

    def rest(self, groups: frozenset[str]) -> None:
        """Empty the gradients of these groups and let the next step pass over them."""
        self._resting = groups
        for name, pieces in self._gradients():
            if name in groups:
                for piece in pieces:
                    piece.zero_()  # they have no part in the norm

    def reached(self, parameters: Sequence[nn.Parameter]) -> list[Reached]:
        """What came of each on some process."""
        from deepspeed.utils import safe_get_full_grad

        came = torch.tensor([parameter in self._arrived for parameter in parameters], dtype=torch.int32)
        came = came.to(self._engine.device)
        torch.distributed.all_reduce(came)
        nonzero = [bool(safe_get_full_grad(parameter).count_nonzero()) for parameter in parameters]
        found = zip(came.tolist(), nonzero, strict=True)
        return [(Reached.MOVED if moved else Reached.ZERO) if count else Reached.NOT for count, moved in found]

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, max_value: float | None = None) -> Tensor:
        """Clip what each process has of the gradients, by the norm of all of them."""
        pieces = [piece for _, group in self._gradients() for piece in group]
        return clip_pieces(pieces, self._engine.device, max_norm, max_value)

    def step(self) -> None:
        """Move the weights.

        Raises:
            GuardError: DeepSpeed has left the step out.
        """
        self._engine.step()
        self._arrived.clear()
        if self.sharded:  # its buffers would give what no gradient reaches that of the step before
            self._zero.grad_partitions_flat_buffer.zero_()
        if self._zero.overflow:
            raise GuardError("DeepSpeed has passed over a step: a gradient is not finite, though their norm is")

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter], change: bool = False) -> Iterator[None]:
        """Gather ``parameters``; what was changed goes into the optimizer's copies too."""
        with self._gathered(parameters, change):
            yield
            values = {parameter: parameter.detach().clone() for parameter in parameters} if change else {}
        for parameter, value in values.items():  # the optimizer has float32 copies of its own
            self._put(parameter, self._flat_of(parameter).data, value)

    def _gathered(self, parameters: Sequence[nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0 if change else None
        )
        return gathered

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Gather all networks for as long as it lasts."""
        if not self.sharded:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield

    def release(self) -> None:
        """Take the hooks off and leave what was cut whole in every process: on the host, which may be larger."""
        if not self.sharded:
            return
        self._zero.parameter_offload.destroy()  # its hooks, which gather weights and deal them out again
        for parameter in self._trainee.parameters():
            with self._gathered([parameter]):
                whole = parameter.detach().to("cpu", copy=True)
            parameter.data = whole
        for buffer in self._trainee.buffers():
            buffer.data = buffer.data.cpu()

    def memory(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Collect what each process remembers of ``parameter``."""
        flat = self._flat_of(parameter)
        held = self._plain.state.get(flat, {})
        return {what: self._remembered(parameter, flat, value) for what, value in held.items()}

    def remember(self, memories: Memories) -> None:
        """Deal ``memories`` out to the processes' stretches.

        Raises:
            UserError: weights of a group have moved unequally often.
        """
        counts: dict[int, set[float | None]] = {}
        for parameter, number in self._group_of.items():
            memory = memories.get(parameter, {})
            counts.setdefault(number, set()).add(float(memory["step"]) if "step" in memory else None)
            flat = self._flat_of(parameter)
            state = self._plain.state[flat]
            for what, value in memory.items():
                if what != "step" and isinstance(value, Tensor):
                    self._put(parameter, state.setdefault(what, torch.zeros_like(flat.detach())), value)
                else:
                    home = count_device(self._plain.param_groups[number], flat)
                    state[what] = value.to(home) if isinstance(value, Tensor) else value
        if uneven := [self._names[number] for number, found in counts.items() if len(found) > 1]:
            raise UserError(
                f"the optimizer has moved weights of the group {uneven[0]!r} unequally often, and ZeRO counts the "
                "steps of a group as a whole: continue this run with ddp or one process"
            )

    def scaler_state(self) -> dict[str, float]:
        """Empty: there is no float16 here."""
        return {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Nothing to put back."""
        return

    def _remembered(self, parameter: nn.Parameter, flat: Tensor, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._get(parameter, value) if value.shape == flat.shape else value.clone()
        return value

    def _note(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            self._arrived.add(parameter)

        return arrived

    def _pass_over(self, optimizer: Optimizer, *_: Any) -> None:
        """Optimizers pass over weights without a gradient; DeepSpeed calls them with one group at a time."""
        for group in optimizer.param_groups:
            if group["name"] in self._resting:
                self._left += [(flat, flat.grad) for flat in group["params"]]
                for flat in group["params"]:
                    flat.grad = None

    def _return(self, *_: Any) -> None:
        for flat, gradient in self._left:  # on the host it is a buffer that is used again
            flat.grad = gradient
        self._left.clear()

    def _flats(self) -> Sequence[nn.Parameter]:
        """Stretches of this process: one for each group, and in stage 3 for each part of it that moves at a time."""
        found: Sequence[nn.Parameter] = (
            self._zero.fp32_partitioned_groups_flat if self.sharded else self._zero.single_partition_of_fp32_groups
        )
        return found

    def _gradients(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The averaged gradients of each stretch, under the name of its group."""
        for number, flat in enumerate(self._flats()):
            group = self._zero.sub_group_to_group_id[number] if self.sharded else number
            averaged = self._zero.averaged_gradients.get(number)
            if averaged is None:  # on the host they lie in the stretch itself
                averaged = [] if flat.grad is None else [flat.grad]
            yield self._names[group], averaged

    def _flat_of(self, parameter: nn.Parameter) -> nn.Parameter:
        if self.sharded:
            return self._flats()[self._place(parameter)[0]]
        return self._flats()[self._group_of[parameter]]

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """In stage 3: which stretch holds a piece of ``parameter``, where it begins and how long it is."""
        number, start, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return number, start, length

    def _get(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        """Of what every process has of ``flat``, all that belongs to ``parameter``, in its shape."""
        device = self._engine.device
        if self.sharded:
            _, start, length = self._place(parameter)
            piece = flat.detach().narrow(0, start, length).to(device)
            pieces = [torch.empty_like(piece) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(pieces, piece)
            return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        found = torch.zeros(parameter.numel(), dtype=flat.dtype, device=device)
        if (here := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            ours, theirs = here.lp_fragment_address, here.hp_fragment_address
            found[ours.start : ours.start + ours.numel] = flat.detach().narrow(0, theirs.start, theirs.numel).to(device)
        torch.distributed.all_reduce(found)
        return found.view(parameter.shape)

    def _put(self, parameter: nn.Parameter, flat: Tensor, value: Tensor) -> None:
        """Write this process's piece of ``value``, which is whole, into ``flat``."""
        values = value.detach().flatten()
        if self.sharded:
            _, start, length = self._place(parameter)
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            padded = F.pad(values, (0, length * world - values.numel()))
            flat.narrow(0, start, length).copy_(padded.narrow(0, length * rank, length))
        elif (here := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            ours, theirs = here.lp_fragment_address, here.hp_fragment_address
            flat.narrow(0, theirs.start, theirs.numel).copy_(values.narrow(0, ours.start, ours.numel))


def _cut(trainee: nn.Module, accelerator: Accelerator) -> None:
    """Move one parameter after the other to the device and cut it; ``deepspeed.initialize`` would move all first."""
    import deepspeed

    settings = _decided(accelerator.state.deepspeed_plugin.deepspeed_config)
    deepspeed.zero.Init(module=trainee, config_dict_or_path=settings)
    for buffer in trainee.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def _decided(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` without what accelerate has still to decide."""
    kept = {key: _decided(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in kept.items() if value != "auto"}
