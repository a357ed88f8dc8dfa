"""Blocks of a frozen network that lie in the host's memory and visit the device when they are due.

Nothing of them changes, so that nothing is ever copied back. While one block computes, the one that is due next is
already on its way, on a stream of its own, from memory that the host has pinned. With gradient checkpointing every
block is computed again in the backward pass and so comes a second time; autograd holds on to its weights until its
gradients are done, and no longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Place(NamedTuple):
    """Where a tensor of a block belongs: an attribute of a module."""

    module: nn.Module
    name: str
    host: Tensor


class BlockSwap:
    """Moves ``blocks`` to ``device`` for the time of their ``forward``. The network must be frozen, and on the CPU.

    Their tensors are no parameters any more but plain attributes, so that ``to`` leaves them where they are and
    processes do not compare them. What is added to a block later, such as an adapter, is not swapped.

    Attributes:
        bytes: of the tensors that lie in the host's memory.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._places: dict[nn.Module, list[_Place]] = {}
        self._order: list[nn.Module] = []  # as they came in the first pass
        self._last = 0
        self._coming: dict[nn.Module, list[Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for block in blocks:
            self._places[block] = [place for module in block.modules() for place in self._take(module)]
            block.register_forward_pre_hook(self._bring)
            block.register_forward_hook(self._return, always_call=True)  # checkpointing ends early by raising

    def _take(self, module: nn.Module) -> list[_Place]:
        """Make plain attributes of a module's own parameters and buffers."""
        places = []
        for registry in (module._parameters, module._buffers):
            for name, tensor in list(registry.items()):
                if tensor is None:
                    continue
                host = tensor.detach()
                host = host.pin_memory() if self._stream else host
                del registry[name]
                object.__setattr__(module, name, host)
                self.bytes += host.nbytes
                places.append(_Place(module, name, host))
        return places

    def _bring(self, block: nn.Module, _: Any) -> None:
        copies = self._coming.pop(block, None) or self._copies(block)
        if self._stream:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for place, copy in zip(self._places[block], copies, strict=True):
            if self._stream:
                copy.record_stream(torch.cuda.current_stream(self.device))
            object.__setattr__(place.module, place.name, copy)
        self._expect(block)

    def _return(self, block: nn.Module, *_: Any) -> None:
        for place in self._places[block]:
            object.__setattr__(place.module, place.name, place.host)

    def _expect(self, block: nn.Module) -> None:
        """Send for the block that comes after ``block``: the next, or the one before where passes go backwards."""
        if block not in self._order:
            self._order.append(block)
        place = self._order.index(block)
        backwards, self._last = place in (self._last - 1, self._last), place
        following = place - 1 if backwards else place + 1
        self._coming.clear()
        if self._stream and 0 <= following < len(self._order):
            self._coming[self._order[following]] = self._copies(self._order[following])

    def _copies(self, block: nn.Module) -> list[Tensor]:
        if self._stream is None:
            return [place.host.to(self.device, copy=True) for place in self._places[block]]
        with torch.cuda.stream(self._stream):
            return [place.host.to(self.device, non_blocking=True) for place in self._places[block]]
