"""Optimizers over a handful of weights, with gradients that are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapter import ParameterGroup
from finetune.config.schema import TrainConfig
from finetune.randomness import generator

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw foreach": {"name": "adamw", "kernel": "foreach"},
    "adamw loop": {"name": "adamw", "kernel": "loop"},
    "sgd": {"nesterov": True},
    "lion": {},
    "adafactor": {},
    "adafactor with a mean": {"name": "adafactor", "beta1": 0.9, "scale_parameter": True},
    "came": {},
    "prodigy": {"d0": 1e-3},
    "prodigy of the paper": {"name": "prodigy", "bias_correction": False, "growth_rate": 1.5},
    "schedulefree": {"r": 1.0},
    "muon": {},
    "torch.optim.RAdam": {"options": {"betas": [0.8, 0.9], "decoupled_weight_decay": True}},
    "torch.optim.ASGD": {},
}


def config(name: str, **settings: Any) -> Any:
    settings = {"name": name, **OPTIMIZERS.get(name, {}), **settings}
    return TrainConfig.model_validate({"optimizer": settings}).optimizer


def numbers(*shape: int, draw: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(0, "optimizers", *shape, draw))


def groups(**settings: Any) -> list[ParameterGroup]:
    """A matrix, a kernel and a vector in one group, a table alone in another that does not decay."""
    first = {
        "net.weight": nn.Parameter(numbers(6, 4)),
        "net.kernel": nn.Parameter(numbers(4, 3, 3, 3)),
        "net.bias": nn.Parameter(numbers(4)),
    }
    table = {"text.table": nn.Parameter(numbers(5, 4))}
    return [
        ParameterGroup("net", first, **settings),
        ParameterGroup("text", table, learning_rate=0.5, factor=2.0, decays=False, tables=frozenset(table)),
    ]


def parameters(of: list[ParameterGroup]) -> Iterator[nn.Parameter]:
    for group in of:
        yield from group.parameters.values()


def set_gradients(of: list[ParameterGroup], draw: int) -> None:
    for parameter in parameters(of):
        parameter.grad = numbers(*parameter.shape, draw=draw)
