"""Where a weight of diffusers' or transformers' network stands in a file of the original code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Settings = Mapping[str, Any]
"""What ``config.json`` of a network holds."""


@dataclass(frozen=True)
class Place:
    """The whole of a tensor, or a third of one.

    Attributes:
        key: of the tensor in the file.
        third: of a tensor that holds query, key and value one below the other: 0, 1 or 2.
        form: "transposed" where the axes are the other way round, "convolution" where a linear layer [out, in] is kept
            as one of 1x1 cells [out, in, 1, 1].
    """

    key: str
    third: int | None = None
    form: Literal["same", "transposed", "convolution"] = "same"

    def below(self, prefix: str) -> Place:
        """The same place in a file that holds more than this network."""
        return replace(self, key=prefix + self.key)

    def take(self, stored: Tensor) -> Tensor:
        """The weight out of the file's tensor. On the meta device it says the shape alone."""
        if self.third is not None:
            return stored.chunk(3)[self.third]
        if self.form == "transposed":
            return stored.T
        return stored.flatten(1) if self.form == "convolution" else stored


PlaceOf = Callable[[str, Settings], Place | None]
"""A weight's name in diffusers' file -> its place behind the network's prefix; None where the original has none."""


def fill(pieces: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """The file's tensor that all weights of one key make: ``Place.take`` backwards.

    Raises:
        ValueError: of three thirds not each is there.
    """
    thirds = {place.third: weight for place, weight in pieces if place.third is not None}
    if thirds:
        if sorted(thirds) != [0, 1, 2]:
            raise ValueError(f"{pieces[0][0].key} is made of three weights; there are only {sorted(thirds)}")
        return torch.cat([thirds[0], thirds[1], thirds[2]])
    ((place, weight),) = pieces
    if place.form == "transposed":
        return weight.T
    return weight[:, :, None, None] if place.form == "convolution" else weight
