"""The modules whose weights FSDP2 deals out together, gathers where they run and lets go of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from finetune.blocks import blocks_of
from finetune.engines.fsdp_settings import FsdpSettings
from finetune.errors import GuardError


class Units:
    """Each block, the layers in lists outside of blocks, and last the whole with what is in none of them.

    Raises:
        GuardError: torch has left one as it is.
    """

    def __init__(self, trainee: nn.Module, device: torch.device, settings: FsdpSettings) -> None:
        world = torch.distributed.get_world_size()
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
        scalars = {one for one in trainee.parameters() if one.ndim == 0 and not one.requires_grad}
        for one in scalars:  # all else is moved by fully_shard
            one.data = one.data.to(device)
        mesh = init_device_mesh(device.type, (world,))
        self._kinds: dict[Any, type[nn.Module]] = {}
        for unit in [*units_of(trainee), trainee]:
            self._kinds[unit] = type(unit)
            reshard = None if unit is trainee and settings.reshard else settings.reshard
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload, ignored_params=scalars)
        if plain := [type(unit).__name__ for unit in self._kinds if not isinstance(unit, FSDPModule)]:
            raise GuardError(f"FSDP2 was asked for, but these are not dealt out: {', '.join(plain[:5])}")

    def reshard(self) -> None:
        """Let go of what is gathered."""
        for unit in self._kinds:
            unit.reshard()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, modules run with what is in them."""
        self._take_hooks()
        try:
            yield
        finally:
            for unit in self._kinds:  # as torch registers them
                state: Any = fully_shard.state(unit)  # type: ignore[attr-defined]
                first = unit.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
                state._pre_forward_hook_handle = first
                state._post_forward_hook_handle = unit.register_forward_hook(state._post_forward)

    def undo(self) -> None:
        """Make ordinary modules of them, for good."""
        self._take_hooks()
        for unit, kind in self._kinds.items():
            unit.__class__ = kind
        self._kinds.clear()

    def _take_hooks(self) -> None:
        for unit in self._kinds:
            state: Any = fully_shard.state(unit)  # type: ignore[attr-defined]
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()


def units_of(trainee: nn.Module) -> list[nn.Module]:
    """Blocks, and members of lists outside of blocks, such as residual layers of a U-Net; inner ones first.

    Only what holds weights that none inside it holds.
    """
    blocks = blocks_of(trainee)
    lists = {name: part for name, part in trainee.named_modules() if isinstance(part, nn.ModuleList)}
    listed = {f"{name}.{number}" for name, part in lists.items() for number, _ in part.named_children()}
    outside = {name for name in listed if not any(name.startswith(f"{block}.") for block in blocks)}
    units: list[nn.Module] = []
    dealt: set[nn.Parameter] = set()
    for name, part in reversed(list(trainee.named_modules())):
        runs = name in outside | blocks.keys() and not isinstance(part, nn.ModuleList | nn.ModuleDict)
        if runs and (own := set(part.parameters()) - dealt):
            units.append(part)
            dealt |= own
    return units
