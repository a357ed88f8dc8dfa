"""Optimizers over an adapter's parameter groups: which there are, and how fast each group learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from finetune.adapter import ParameterGroup
from finetune.config.optimizer import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    CameConfig,
    ClassConfig,
    Lion8bitConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    ProdigyConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from finetune.errors import UserError
from finetune.train.optim import named
from finetune.train.optim.came import Came
from finetune.train.optim.lion import Lion
from finetune.train.optim.muon import MuonWithAdamW
from finetune.train.optim.prodigy import Prodigy
from finetune.train.optim.schedule_free import ScheduleFree

Groups = list[dict[str, Any]]


def build_optimizer(config: OptimizerConfig, groups: Sequence[ParameterGroup], learning_rate: float) -> Optimizer:
    """An optimizer whose groups are the adapter's, and remember their ``name`` and ``peak`` learning rate.

    Kernels are named and not left to chance: resuming has to find those that the run began with.

    Raises:
        UserError: the optimizer is not installed, needs a GPU that is not there, or has nothing to act on.
    """
    if isinstance(config, ClassConfig):
        return _of_class(config, groups, learning_rate)
    described, settings = _described(groups, learning_rate), config.model_dump(exclude={"name", "kernel"})
    match config:
        case AdamWConfig(kernel=kernel):
            kernels: dict[str, Any] = {"fused": kernel == "fused", "foreach": kernel == "foreach"}
            return torch.optim.AdamW(described, lr=learning_rate, **settings, **kernels)
        case SgdConfig():
            return torch.optim.SGD(described, lr=learning_rate, **settings, foreach=False)
        case LionConfig():
            return Lion(described, lr=learning_rate, **settings)
        case CameConfig():
            return Came(described, lr=learning_rate, **settings)
        case ProdigyConfig():
            return Prodigy(described, lr=learning_rate, **settings)
        case ScheduleFreeConfig():
            return ScheduleFree(described, lr=learning_rate, **settings)
        case MuonConfig():
            return _muon(config, groups, learning_rate)
        case AdafactorConfig():
            from transformers.optimization import Adafactor

            return Adafactor(described, lr=learning_rate, **settings, relative_step=False)
        case AdamW8bitConfig() | Lion8bitConfig():
            return _eight_bits(config.name)(described, lr=learning_rate, **settings)


def require_available(config: OptimizerConfig) -> None:
    """Find out before anything is loaded whether the optimizer can be had.

    Raises:
        UserError: as ``build_optimizer``, as far as that needs no weights.
    """
    match config:
        case ClassConfig():
            named.find(config.name, config.options)
        case AdamW8bitConfig() | Lion8bitConfig():
            _eight_bits(config.name)


def set_rates(optimizer: Optimizer, rate: float) -> dict[str, float]:
    """Give every group ``rate`` times its peak, and return the learning rates by the groups' names."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    return rates(optimizer)


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates by the groups' names, with what the optimizer itself multiplies them by.

    Optimizers that find their rate keep it as ``d``, which began at ``d0``.
    """
    return {group["name"]: group["lr"] * (group["d"] if "d0" in group else 1.0) for group in optimizer.param_groups}


def averages(optimizer: Optimizer) -> bool:
    """Whether weights are one thing while training and another, by the optimizer's ``eval()``, afterwards."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


@contextmanager
def evaluated(optimizer: Optimizer) -> Iterator[None]:
    """Inside, weights are those of ``eval()``; afterwards those that train again, bit for bit."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    training = [weight.detach().clone() for weight in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            torch._foreach_copy_(weights, training)


def _described(groups: Sequence[ParameterGroup], learning_rate: float, decays: bool = True) -> Groups:
    """The groups as optimizers take them; those that must not decay say so, where the optimizer ``decays`` at all."""
    return [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "peak": (group.learning_rate or learning_rate) * group.factor,
            **({} if group.decays or not decays else {"weight_decay": 0.0}),
        }
        for group in groups
    ]


def _by_kind(groups: Sequence[ParameterGroup], learning_rate: float) -> Groups:
    """The groups, each parted into what Muon moves and what it does not."""
    parted = []
    for group, described in zip(groups, _described(groups, learning_rate), strict=True):
        matrices = {name for name, one in group.parameters.items() if one.ndim == 2 and name not in group.tables}
        for kind in ("matrices", "others"):
            found = [one for name, one in group.parameters.items() if (name in matrices) == (kind == "matrices")]
            parted += [{**described, "params": found, "kind": kind}] if found else []
    return parted


def _muon(config: MuonConfig, groups: Sequence[ParameterGroup], learning_rate: float) -> Optimizer:
    parted = _by_kind(groups, learning_rate)
    if not any(group["kind"] == "matrices" for group in parted):
        raise UserError("train.optimizer.name: muon moves matrices, and none trains here; use adamw")
    matrices = {"momentum": config.momentum, "nesterov": config.nesterov, "ns_steps": config.ns_steps}
    others = {"betas": config.betas, "eps": config.eps, "fused": True}
    return MuonWithAdamW(parted, learning_rate, config.weight_decay, matrices, others)


def _eight_bits(name: str) -> Callable[..., Optimizer]:
    """A class of bitsandbytes."""
    if not torch.cuda.is_available():
        raise UserError(f"train.optimizer.name: {name} needs a CUDA GPU, and there is none")
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"train.optimizer.name: {name} needs bitsandbytes: pip install 'finetune[8bit]'") from None
    found: Callable[..., Optimizer] = {
        "adamw8bit": bitsandbytes.optim.AdamW8bit,
        "lion8bit": bitsandbytes.optim.Lion8bit,
    }[name]
    return found


def _of_class(config: ClassConfig, groups: Sequence[ParameterGroup], learning_rate: float) -> Optimizer:
    found = named.find(config.name, config.options)
    described = _described(groups, learning_rate, decays=named.takes(found, "weight_decay"))
    optimizer = named.make(found, described, learning_rate, config.options)
    if averages(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer
