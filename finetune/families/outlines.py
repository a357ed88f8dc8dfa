"""A network without its weights, and the same network again around weights that are in memory already."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def outline(network: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; buffers are shared. Costs no memory to speak of."""
    known: dict[int, object] = {id(buffer): buffer for buffer in network.buffers()}
    for parameter in network.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(network, known)


def filled(outline: nn.Module, held: nn.Module, originals: Mapping[str, Tensor]) -> nn.Module:
    """Another copy of an ``outline`` around the parameters and buffers of ``held``: frozen, in ``eval()``.

    Args:
        held: the network that the outline is of, into which PEFT may have put layers since.
        originals: name of a parameter -> what is taken in place of it.
    """
    copied = copy.deepcopy(outline, {id(buffer): buffer for buffer in outline.buffers()})
    tied: dict[int, nn.Parameter] = {}
    for path, module in copied.named_modules():
        start = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            tensor = originals.get(start + name, _tensor(held, path, name)).to(parameter.dtype)
            setattr(module, name, tied.setdefault(id(parameter), nn.Parameter(tensor, requires_grad=False)))
        for name, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, originals.get(start + name, _tensor(held, path, name)))
    return copied.eval()


def _tensor(network: nn.Module, path: str, name: str) -> Tensor:
    """What ``name`` is of the module at ``path``, whatever was put around modules on the way.

    Asked of the module and not of its lists of parameters, which swapped blocks have none of.
    """
    module = _inmost(network)
    for step in filter(None, path.split(".")):
        module = _inmost(getattr(module, step))
    tensor: Tensor = getattr(module, name)
    return tensor.detach()


def _inmost(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
