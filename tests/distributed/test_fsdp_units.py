"""Modules that FSDP2 deals out: which they are, and that they can be made to run as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from finetune.engines.fsdp import _require_cuttable
from finetune.engines.fsdp_settings import FsdpSettings
from finetune.engines.fsdp_units import Units, units_of
from finetune.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])  # as diffusers' feed-forward layers have it

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.net[1](self.net[0](values))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.transformer_blocks = nn.ModuleList([Block(), Block()])
        self.resnets = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.embed(values) * self.scale
        for part in [*self.transformer_blocks, *self.resnets]:
            values = part(values)
        return values


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def hooks(network: nn.Module) -> dict[str, list[OrderedDict[int, Any]]]:
    kept = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        name: [OrderedDict(enumerate(getattr(part, kind).values())) for kind in kept]
        for name, part in network.named_modules()
    }


def test_units_are_blocks_and_layers_of_lists_but_nothing_inside_a_block() -> None:
    network = Network()
    names = {part: name for name, part in network.named_modules()}
    found = [names[part] for part in units_of(network)]
    assert found == ["resnets.0", "transformer_blocks.1", "transformer_blocks.0"], "a dropout has nothing to cut"


def test_hooks_go_and_come_back_as_torch_had_put_them(alone: None) -> None:
    """The one place where torch's own attributes are used: another torch may call them otherwise."""
    network, plain = Network(), hooks(Network())
    values = torch.randn(2, 4)
    before = network(values)
    units = Units(network, torch.device("cpu"), FsdpSettings())
    cut = hooks(network)
    assert cut != plain and isinstance(network.embed.weight, DTensor) and not isinstance(network.scale, DTensor)
    with units.off():
        assert hooks(network) == plain
    assert hooks(network) == cut
    answer = network(values)
    torch.testing.assert_close(answer, before)
    answer.sum().backward()
    assert isinstance(network.transformer_blocks[0].net[1].weight.grad, DTensor), "or nothing was averaged"
    units.reshard()
    units.undo()
    assert hooks(network) == plain
    assert not any(isinstance(part, FSDPModule) for part in network.modules())


def test_a_single_number_that_trains_is_refused() -> None:
    network = Network()
    _require_cuttable(network)
    network.scale.requires_grad_(True)
    with pytest.raises(UserError, match=r"scale is a single number that trains.*ddp or zero2"):
        _require_cuttable(network)
