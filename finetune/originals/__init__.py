"""What the code that a model was published with calls the layers that diffusers has under other names.

Most tools that draw load that code's model and look for a LoRA's layers by its names. A table of this package has every
linear and convolution layer of an architecture: path in diffusers' model -> ``Place``. They are made from a model's
settings and need no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a layer of diffusers' model is in the original one.

    Several of diffusers' layers may be one there: the weights of queries, keys and values, one below the other. The
    outputs of such a layer are counted in equal shares.

    Attributes:
        path: of the layer there.
        first: shares of its outputs that come before this layer's.
        share: how many are this layer's.
        of: how many there are.
        swapped: whether the two halves of the outputs are the other way round there: shift and scale.
    """

    path: str
    first: int = 0
    share: int = 1
    of: int = 1
    swapped: bool = False

    @property
    def alone(self) -> bool:
        """Whether the layer there is this one and nothing else."""
        return self.of == 1 and not self.swapped


Places = Mapping[str, Place]


def fused(path: str, shares: Mapping[str, int]) -> dict[str, Place]:
    """The places of layers that are one in the original, in the order of its outputs, by how large each is."""
    found, first, of = {}, 0, sum(shares.values())
    for layer, share in shares.items():
        found[layer] = Place(path, first, share, of)
        first += share
    return found


def renamed(paths: Mapping[str, str]) -> dict[str, Place]:
    """The places of layers that only have another name."""
    return {layer: Place(path) for layer, path in paths.items()}
