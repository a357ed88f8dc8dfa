"""What the code that a model was published with calls the layers that diffusers has under other names.

Most tools that draw load that code's model, and look for a LoRA's layers and for a whole model's weights by its names.
A table of this package has every layer of an architecture: path in diffusers' model -> ``Place``. A weight that is not
called there as its layer is stands in the table for itself. They are made from a model's settings and need no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Place:
    """Where a layer or a weight of diffusers' model is in the original one.

    Several of diffusers' layers may be one there: the weights of queries, keys and values, one below the other. The
    outputs of such a layer are counted in equal shares.

    Attributes:
        path: of the layer or weight there.
        first: shares of its outputs that come before this layer's.
        share: how many are this layer's.
        of: how many there are.
        swapped: whether the two halves of the outputs are the other way round there: shift and scale.
        form: "transposed" where a matrix has its axes the other way round there, "convolution" where a linear layer
            [out, in] is one of 1x1 cells, [out, in, 1, 1].
    """

    path: str
    first: int = 0
    share: int = 1
    of: int = 1
    swapped: bool = False
    form: Literal["same", "transposed", "convolution"] = "same"

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


def weight(places: Places, name: str) -> Place | None:
    """Where a weight of diffusers' model is; None where the original has none."""
    if name in places:
        return places[name]
    layer, _, kind = name.rpartition(".")
    found = places.get(layer)
    return None if found is None else replace(found, path=f"{found.path}.{kind}")
