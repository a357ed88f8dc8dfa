"""PyTorch's FSDP2 (Zhao et al. 2023, https://arxiv.org/abs/2304.11277; ``torch.distributed.fsdp.fully_shard``).

Every weight is cut along its first axis into one *piece* per process. Blocks are gathered where they run, forwards and
backwards; what lies outside of blocks is there for the whole of a step. ``fully_shard`` puts parameters of its own into
the modules. Those that the run knows, and names everywhere, stay aside and empty; where weights have to be whole, they
are filled and put back into the modules for the time.

The optimizer has this process's pieces, as ordinary tensors over the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.engines import Memories, Reached, put
from finetune.engines.fsdp_settings import FsdpSettings
from finetune.engines.fsdp_units import Units
from finetune.engines.pieces import clip_pieces
from finetune.errors import UserError


class Fsdp2:
    """An ``Engine`` under FSDP2.

    Args:
        trainee, optimizer: wrapped once. Wherever weights lie, one unit after the other is moved to the device and cut.
            What the loss reads outside of the modules that hold it lies outside of blocks.
        autocast: of the forward pass, None for float32.

    Raises:
        UserError: a single number trains, which cannot be cut.
        GuardError: torch has left a module as it is.
    """

    sharded = True
    scales_loss = False

    def __init__(
        self,
        accelerator: Accelerator,
        trainee: nn.Module,
        optimizer: Optimizer,
        autocast: torch.dtype | None,
        settings: FsdpSettings,
    ) -> None:
        self._device = accelerator.device
        self._world, self._rank = accelerator.num_processes, accelerator.process_index
        self._steps = accelerator.gradient_accumulation_steps
        self._done = 0  # micro-steps of the update
        self._autocast = autocast
        self._trainee, self._plain = trainee, optimizer
        _require_cuttable(trainee)
        self._homes = _homes(trainee)
        self._units = Units(trainee, self._device, settings)
        self._sharded: dict[nn.Parameter, Any] = {}  # what fully_shard has put in place of it, a DTensor
        for parameter, places in self._homes.items():
            module, name = places[0]
            self._sharded[parameter] = getattr(module, name)
            parameter.data = parameter.data.new_empty(0)
        self._whole: set[nn.Parameter] = set()
        self._pieces: dict[nn.Parameter, nn.Parameter] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._pieces[parameter] = nn.Parameter(self._sharded[parameter].detach().to_local())
            group["params"] = [self._pieces[parameter] for parameter in group["params"]]

    @property
    def boundary(self) -> bool:
        """Whether this is the last micro-step of the update."""
        return self._done == self._steps

    @property
    def optimizer(self) -> Optimizer:
        """As it was given; its parameters are this process's pieces by now."""
        return self._plain

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Count one micro-step. Gradients go to their processes in each: whole, they would take as much as weights."""
        self._done = self._done % self._steps + 1
        yield

    def forward(self, *inputs: Any) -> Any:
        """Call the module, whose hooks gather weights.

        Casts are not kept for a second use, as those of every block would add up to the whole network.
        """
        with torch.autocast(self._device.type, self._autocast, self._autocast is not None, cache_enabled=False):
            return self._trainee(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add gradients, which FSDP2 averages over the processes and cuts."""
        (loss / self._steps).backward()  # type: ignore[no-untyped-call]
        if self.boundary:
            for parameter, piece in self._pieces.items():
                gradient = self._sharded[parameter].grad
                piece.grad = None if gradient is None else gradient.to_local()

    def rest(self, groups: frozenset[str]) -> None:
        """Take away the gradients of these groups: optimizers pass over weights without one."""
        for group in self._plain.param_groups:
            if group["name"] in groups:
                for piece in group["params"]:
                    piece.grad = None

    def reached(self, parameters: Sequence[nn.Parameter]) -> list[Reached]:
        """What came of each on some process."""
        gradients = [self._pieces[parameter].grad for parameter in parameters]
        rows = [[0, 0] if one is None else [1, int(one.count_nonzero())] for one in gradients]
        found = torch.tensor(rows, device=self._device)
        torch.distributed.all_reduce(found)
        return [(Reached.MOVED if moved else Reached.ZERO) if came else Reached.NOT for came, moved in found.tolist()]

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, max_value: float | None = None) -> Tensor:
        """Clip what each process has of the gradients, by the norm of all of them."""
        gradients = [piece.grad for piece in self._pieces.values() if piece.grad is not None]
        return clip_pieces(gradients, self._device, max_norm, max_value)

    def step(self) -> None:
        """Move the pieces and forget the gradients."""
        self._plain.step()
        for parameter, piece in self._pieces.items():
            piece.grad = self._sharded[parameter].grad = None

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter], change: bool = False) -> Iterator[None]:
        """Put ``parameters`` back into their modules, filled; what was changed goes into the pieces."""
        filled = [parameter for parameter in parameters if parameter not in self._whole]
        self._fill(filled)
        try:
            yield
            if change:
                for parameter in filled:
                    piece = self._piece(parameter)
                    piece.copy_(self._mine(piece, parameter.detach()))
        finally:
            self._empty(filled)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Fill all networks, and let nothing be gathered or cut for as long as it lasts."""
        with self.whole(list(self._homes)), self._units.off():
            yield

    def release(self) -> None:
        """Leave all weights whole in every process: on the host, which may be larger. The modules forget FSDP."""
        self._fill([parameter for parameter in self._homes if parameter not in self._whole], torch.device("cpu"))
        self._units.undo()
        self._sharded.clear()
        self._trainee.to("cpu")  # the little that was not dealt out

    def memory(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Collect what each process remembers of ``parameter``."""
        piece = self._pieces[parameter]
        held = self._plain.state.get(piece, {})
        rows = self._sharded[parameter].shape[0]
        return {what: self._gathered(value, rows) if _like(value, piece) else value for what, value in held.items()}

    def remember(self, memories: Memories) -> None:
        """Give each process its pieces of ``memories``."""
        cut: dict[nn.Parameter, dict[str, Any]] = {}
        for parameter, memory in memories.items():
            piece, sharded = self._pieces[parameter], self._sharded[parameter]
            cut[piece] = {
                what: self._mine(piece, value) if _like(value, sharded) else value for what, value in memory.items()
            }
        put(self._plain, cut)

    def scaler_state(self) -> dict[str, float]:
        """Empty: there is no float16 here."""
        return {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Nothing to put back."""
        return

    @torch.no_grad()
    def _fill(self, parameters: Sequence[nn.Parameter], device: torch.device | None = None) -> None:
        self._units.reshard()
        for parameter in parameters:
            whole = self._gathered(self._piece(parameter), self._sharded[parameter].shape[0])
            parameter.data = whole.to(device or self._device)
            self._place(parameter, parameter)
        self._whole |= set(parameters)

    def _empty(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            self._place(parameter, self._sharded[parameter])
            parameter.data = parameter.data.new_empty(0)
        self._whole -= set(parameters)

    def _place(self, parameter: nn.Parameter, value: nn.Parameter) -> None:
        for module, name in self._homes[parameter]:
            module.register_parameter(name, value)

    def _piece(self, parameter: nn.Parameter) -> Tensor:
        piece: Tensor = self._sharded[parameter].detach().to_local()
        return piece

    def _gathered(self, piece: Tensor, rows: int) -> Tensor:
        """All ``rows`` of a tensor of which every process has a piece. The last pieces may be shorter, or empty."""
        longest = -(-rows // self._world)
        padded = piece.new_zeros(longest, *piece.shape[1:], device=self._device)
        padded[: len(piece)] = piece
        found = padded.new_empty(longest * self._world, *piece.shape[1:])
        torch.distributed.all_gather_into_tensor(found, padded)
        return found[:rows].clone() if rows < len(found) else found

    def _mine(self, piece: Tensor, value: Tensor) -> Tensor:
        """Rows of ``value``, which is whole, that belong to this process."""
        longest = -(-len(value) // self._world)
        return value.narrow(0, min(longest * self._rank, len(value)), len(piece))


def _homes(trainee: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Where each parameter lies, tied ones in several places; but for scalars, which nothing can be cut off."""
    homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in trainee.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim:
                homes.setdefault(parameter, []).append((module, name))
    return homes


def _require_cuttable(trainee: nn.Module) -> None:
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad and not parameter.ndim:
            raise UserError(
                f"{name.removeprefix('networks.')} is a single number that trains, and FSDP2 cuts weights along their "
                "first axis: launch with ddp or zero2"
            )


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
