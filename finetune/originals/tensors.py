"""Tensors of diffusers' layers into those of the original, and back. On the meta device they say shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.originals import Place


def rows(place: Place, height: int) -> slice:
    """The outputs of a layer inside the original one of ``height`` outputs."""
    unit = height // place.of
    return slice(place.first * unit, (place.first + place.share) * unit)


def swap(place: Place, tensor: Tensor) -> Tensor:
    """The outputs in the order of the original, or back: the same step both ways."""
    return torch.cat(tensor.chunk(2)[::-1]) if place.swapped else tensor


def stack(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """Parts [out, ...] below each other in the original's order, zeros where there is none."""
    height = parts[0].shape[0] // places[0].share * places[0].of
    whole = parts[0].new_zeros(height, *parts[0].shape[1:])
    for place, part in zip(places, parts, strict=True):
        whole[rows(place, height)] = swap(place, part)
    return whole


def take(place: Place, whole: Tensor) -> Tensor:
    """A weight out of the original's tensor."""
    found = swap(place, whole[rows(place, whole.shape[0])] if place.of > 1 else whole)
    if place.form == "transposed":
        return found.T
    return found.flatten(1) if place.form == "convolution" and found.dim() > 1 else found


def fill(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """The original's tensor that weights make together: ``take`` backwards.

    Raises:
        ValueError: a share of it is missing, or there are others than these.
    """
    place, part = places[0], parts[0]
    if sum(one.share for one in places) != place.of:
        raise ValueError(f"{place.path} is made of {place.of} shares; there are {sum(one.share for one in places)}")
    if place.of > 1:
        return stack(places, parts)
    if place.form == "transposed":
        return part.T
    return part[:, :, None, None] if place.form == "convolution" and part.dim() > 1 else swap(place, part)
