"""The blocks of a network: what is packed, swapped, computed twice and dealt out to processes one at a time."""

from __future__ import annotations

import re

from torch import nn

_BLOCK = re.compile(r"(.*\.)?(\w*transformer_blocks|\w+_refiner|layers|block)\.\d+")


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by their names, outermost alone. They hold most of its weights."""
    found: dict[str, nn.Module] = {}
    for name, part in network.named_modules():
        if _BLOCK.fullmatch(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return found
