"""What an optimizer remembers, under the parameters' own names: what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.adapter import ParameterGroup
from finetune.engines import Memories, Memory, put
from finetune.errors import UserError

_OURS = ("params", "name", "kind", "peak", "lr")  # of a group: given anew by every start and step
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NUMBER = "#"  # ends the name of what was a plain number


def state_by_name(
    optimizer: Optimizer, groups: Sequence[ParameterGroup], memory: Memory | None = None
) -> dict[str, Tensor]:
    """All that the optimizer remembers.

    Of a parameter ``<parameter>/<what>``, for example ``denoiser.conv_in.weight/exp_avg``; of the optimizer's group
    number n, what a step has changed, as ``groups.<n>/<what>``. Plain numbers become tensors, and ``#`` ends their
    names.

    Args:
        memory: an engine's, which finds what is remembered of a parameter; in the optimizer itself by default.

    Raises:
        UserError: it remembers what is neither tensor nor number.
    """
    kept: dict[str, Tensor] = {}
    for name, parameter in _named(groups):
        remembered = memory(parameter) if memory else optimizer.state.get(parameter, {})
        for what, value in remembered.items():
            kept |= _kept(f"{name}/{what}", value, optimizer)
    for number, group in enumerate(optimizer.param_groups):
        for what, value in group.items():
            if what not in _OURS and (isinstance(value, Tensor) or value != optimizer.defaults.get(what)):
                kept |= _kept(f"groups.{number}/{what}", value, optimizer)
    return kept


def load_state_by_name(
    optimizer: Optimizer,
    groups: Sequence[ParameterGroup],
    state: Mapping[str, Tensor],
    remember: Callable[[Memories], None] | None = None,
) -> None:
    """Put ``state_by_name`` back, bit for bit.

    Args:
        remember: an engine's, which puts back what is remembered of parameters; into the optimizer itself by default.

    Raises:
        UserError: the state belongs to other parameters.
    """
    parameters = dict(_named(groups))
    numbered = {f"groups.{number}": group for number, group in enumerate(optimizer.param_groups)}
    memories: dict[nn.Parameter, dict[str, Any]] = {}
    device = next(iter(parameters.values())).device
    for key, value in state.items():
        owner, what = key.rsplit("/", 1)
        if owner in parameters:
            place = memories.setdefault(parameters[owner], {})
        elif owner in numbered:
            place = numbered[owner]
        else:
            raise UserError(f"the optimizer's state is of another run: this one has no parameter {owner!r}")
        if what.endswith(_NUMBER):
            place[what.removesuffix(_NUMBER)] = value.item()
        else:
            place[what] = value if owner in parameters else value.to(device, copy=True)
    (remember or partial(put, optimizer))(memories)


def _kept(key: str, value: Any, optimizer: Optimizer) -> dict[str, Tensor]:
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {key: value}
    if type(value) in _NUMBERS:
        return {f"{key}{_NUMBER}": torch.tensor(value, dtype=_NUMBERS[type(value)])}
    name, kind = type(optimizer).__name__, type(value).__name__
    raise UserError(f"train.optimizer.name: {name} keeps {key} as a {kind}, which no checkpoint can hold")


def _named(groups: Sequence[ParameterGroup]) -> list[tuple[str, nn.Parameter]]:
    return [item for group in groups for item in group.parameters.items()]
