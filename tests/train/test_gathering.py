"""Checkpoints are put together a tensor at a time, on the host, by the process that writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from finetune.engines import Engine
from finetune.train.gathering import gather_weights, memory_of, scatter_weights


class Cut:
    """An engine whose weights are empty but where they are asked for, as one of many processes has them."""

    def __init__(self, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        self.values, self.open, self.most = dict(values), 0, 0

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter], change: bool = False) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = self.values[parameter].clone()
        self.open += len(parameters)
        self.most = max(self.most, self.open)
        yield
        self.open -= len(parameters)
        for parameter in parameters:
            if change:
                self.values[parameter] = parameter.detach().clone()
            parameter.data.untyped_storage().resize_(0)  # what was not copied is lost

    def memory(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        return {"exp_avg": self.values[parameter] / 2, "step": 3}


def cut() -> tuple[Engine, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.empty(0)) for name in ("up", "down", "scale")}
    engine = Cut({one: torch.full((2, 3), 1.0 + number) for number, one in enumerate(parameters.values())})
    return cast(Engine, engine), parameters


def test_weights_are_gathered_one_at_a_time_and_outlive_it() -> None:
    """All at once they are four bytes a weight on every device, in runs that cut them because that does not fit."""
    engine, parameters = cut()
    found = gather_weights(engine, parameters, keep=True)
    assert {name: float(value.mean()) for name, value in found.items()} == {"up": 1.0, "down": 2.0, "scale": 3.0}
    assert cast(Any, engine).most == 1
    assert gather_weights(engine, parameters, keep=False) == {}


def test_weights_are_put_back_one_at_a_time() -> None:
    engine, parameters = cut()
    found = gather_weights(engine, parameters, keep=True)
    scatter_weights(engine, parameters, {name: value + 5 for name, value in found.items()})
    again = gather_weights(engine, parameters, keep=True)
    assert all(torch.equal(again[name], value + 5) for name, value in found.items())
    assert cast(Any, engine).most == 1


def test_only_the_process_that_writes_keeps_what_the_optimizer_remembers() -> None:
    engine, parameters = cut()
    mine = memory_of(engine, keep=True)(parameters["down"])
    assert torch.equal(mine["exp_avg"], torch.ones(2, 3)) and mine["step"] == 3
    assert memory_of(engine, keep=False)(parameters["down"]) == {}
