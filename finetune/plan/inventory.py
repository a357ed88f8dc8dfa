"""The tensors of a run, as ``finetune.plan.held`` and ``finetune.plan.traffic`` count them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from finetune.adapter import ParameterGroup
from finetune.engines.fsdp_units import units_of
from finetune.plan.weights import Weight


def inventory(networks: nn.ModuleDict, groups: Sequence[ParameterGroup], held: Iterable[str]) -> list[Weight]:
    """Every parameter of the networks that are in memory while steps are taken: those that train, then the others.

    Args:
        networks: with what trains attached; skeletons will do.
        groups: of what trains.
        held: names of the networks.
    """
    trained = {parameter for group in groups for parameter in group.parameters.values()}
    inside = {name for name in held if any(one in trained for one in networks[name].parameters())}
    dealt = nn.ModuleDict({name: networks[name] for name in held if name in inside | {"denoiser"}})
    homes: dict[nn.Parameter, str | None] = dict.fromkeys(dealt.parameters())
    for number, unit in enumerate(units_of(dealt)):
        for parameter in unit.parameters():
            homes[parameter] = homes[parameter] or str(number)
    found = [
        Weight(tuple(one.shape), group=group.name, dealt=one in homes, unit=homes.get(one))
        for group in groups
        for one in group.parameters.values()
    ]
    rest = dict.fromkeys(one for name in held for one in networks[name].parameters() if one not in trained)
    return found + [Weight(tuple(o.shape), o.element_size(), None, o in homes, homes.get(o)) for o in rest]
