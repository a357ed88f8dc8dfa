"""Trained weights over those of the base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import GuardError
from finetune.export.layers import check


class Overlay:
    """Puts each trained weight in the place of the base's, and knows which found none.

    Args:
        dtype: of all floating-point numbers that come out.

    Raises:
        GuardError: there are no weights, or one is empty or not finite.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        check(weights.tensors)
        self.dtype = dtype
        self._trained = weights.tensors
        self._rest = set(weights.tensors)
        self._changed = False

    def over(self, name: str, old: Tensor) -> Tensor:
        """What stands in the place of the base's ``old``, by its canonical name.

        Raises:
            GuardError: the trained weight is of another shape.
        """
        if name not in self._trained:
            return cast(old, self.dtype)
        new = self._trained[name]
        self._rest.discard(name)
        if new.shape != old.shape:
            raise GuardError(f"{name} is {list(new.shape)}, but {list(old.shape)} in the base model")
        written = cast(new, self.dtype)
        self._changed = self._changed or not torch.equal(written, cast(old, self.dtype))
        return written

    def finish(self, base: Path) -> None:
        """Refuse a model that is not what was trained.

        Raises:
            GuardError: a trained weight was asked for nowhere, or none differs from the base's.
        """
        if self._rest:
            raise GuardError(
                f"{len(self._rest)} trained tensors have no place in {base}, for example {min(self._rest)}"
            )
        if not self._changed:
            raise GuardError("nothing was learned: every trained weight equals the base model's")


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, if it holds floating-point numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
