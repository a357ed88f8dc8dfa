"""Optimizers over an adapter's parameter groups, and their state under the parameters' own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.adapter import ParameterGroup
from finetune.config.schema import OptimizerConfig
from finetune.errors import UserError


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[ParameterGroup], learning_rate: float
) -> torch.optim.Optimizer:
    """An optimizer with one group per ``ParameterGroup``, which remembers its ``name`` and ``peak`` learning rate.

    The kernel is named and not left to chance: resuming has to find the one that the run began with.
    """
    described = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "peak": (group.learning_rate or learning_rate) * group.factor,
            "weight_decay": config.weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(
                described,
                lr=learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case "sgd":  # its momentum is the first beta
            return torch.optim.SGD(
                described, lr=learning_rate, momentum=config.betas[0], weight_decay=config.weight_decay, foreach=False
            )


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> dict[str, float]:
    """Give every group ``rate`` times its peak, and return the learning rates by the groups' names."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    return rates(optimizer)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates by the groups' names."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def state_by_name(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    """The optimizer's memory as ``<parameter>/<what>`` -> tensor, for example ``denoiser.conv_in.weight/exp_avg``."""
    state = {}
    for name, parameter in _named(groups):
        for what, value in optimizer.state[parameter].items():
            if value is not None:
                state[f"{name}/{what}"] = torch.as_tensor(value)
    return state


def load_state_by_name(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], state: Mapping[str, Tensor]
) -> None:
    """Put ``state_by_name`` back, bit for bit.

    Raises:
        UserError: the state belongs to other parameters.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, what = key.rsplit("/", 1)
        by_parameter.setdefault(name, {})[what] = value
    names = [name for name, _ in _named(groups)]
    if unknown := sorted(set(by_parameter) - set(names)):
        raise UserError(f"the optimizer's state is of another run: this one has no parameter {unknown[0]!r}")
    numbered = {number: by_parameter[name] for number, name in enumerate(names) if name in by_parameter}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _named(groups: Sequence[ParameterGroup]) -> list[tuple[str, torch.nn.Parameter]]:
    return [item for group in groups for item in group.parameters.items()]
