"""Several changes of a layer as one: the formulas, on tensors of one layer.

``D_i`` are whole changes, ``w_i`` weights.

- concat: ``sum w_i D_i``, exact, as ``[w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]``: ranks add up.
- svd: the same, cut off at a rank.
- sum: factors are added, ``A = sum sign(w_i) sqrt(|w_i| s_i) A_i`` and ``B = sum sqrt(|w_i| s_i) B_i``, as PEFT's
  "linear" does. The product has mixed terms ``B_i A_j``: it is meant for adapters of one run, whose factors are close.
- TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708): of each adapter the share ``density`` of numbers that are
  largest in all its layers together is kept; each number's sign is that of ``sum w_i D_i``; the mean of the ``w_i D_i``
  that have it is taken.
- DARE (Yu et al. 2023, https://arxiv.org/abs/2311.03099): each number is dropped with probability ``drop``, and what
  remains divided by ``1 - drop``; then the sum, or TIES' choice of signs and mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.export.layers import Layer
from finetune.randomness import generator


def concatenated(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """The exact sum; alpha is the rank."""
    down = torch.cat([layer.down.float() for layer in layers])
    ups = [layer.up.float() * (weight * layer.scale) for layer, weight in zip(layers, weights, strict=True)]
    return replace(layers[0], down=down, up=torch.cat(ups, dim=1), alpha=float(len(down)))


def added(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """Factors added; alpha is the rank."""
    roots = [abs(weight * layer.scale) ** 0.5 for layer, weight in zip(layers, weights, strict=True)]
    signs = [1.0 if weight >= 0 else -1.0 for weight in weights]
    down = sum(
        (sign * root * layer.down.float() for layer, root, sign in zip(layers, roots, signs, strict=True)),
        start=torch.zeros(()),
    )
    up = sum((root * layer.up.float() for layer, root in zip(layers, roots, strict=True)), start=torch.zeros(()))
    return replace(layers[0], down=down, up=up, alpha=float(layers[0].rank))


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum w_i D_i``."""
    return sum((weight * change for change, weight in zip(changes, weights, strict=True)), start=torch.zeros(()))


def trimmed(change: Tensor, threshold: float) -> Tensor:
    """TIES' first step: what is smaller than ``threshold`` becomes zero."""
    return torch.where(change.abs() >= threshold, change, 0.0)


def elected(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' second and third step: the sign of the sum, and the mean of those that have it."""
    stacked = torch.stack([weight * change for change, weight in zip(changes, weights, strict=True)])
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def dropped(change: Tensor, drop: float, seed: int, adapter: int, layer: str) -> Tensor:
    """DARE: numbers dropped by a draw that is named by the adapter's position and the layer."""
    kept = torch.rand(change.shape, generator=generator(seed, "dare", adapter, layer)) >= drop
    return torch.where(kept, change / (1.0 - drop), 0.0)


def threshold(changes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude of the last number of the share ``density`` that is kept of all changes together.

    It is exact, and found without all of them in memory: non-negative float32 numbers are in the order of their
    bits, of which the upper half is counted first, then the lower half of those that share it.

    Args:
        changes: one after another; asked for twice.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for change in changes():
        upper += torch.bincount(_bits(change) >> 16, minlength=1 << 16)
    rank = max(1, round(density * int(upper.sum())))  # the so-many-th largest is sought
    half, rank = _nth_largest(upper, rank)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for change in changes():
        bits = _bits(change)
        lower += torch.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
    rest, _ = _nth_largest(lower, rank)
    return float(torch.tensor((half << 16) | rest, dtype=torch.int32).view(torch.float32))


def _bits(change: Tensor) -> Tensor:
    return change.float().abs().flatten().view(torch.int32)


def _nth_largest(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest number, and its rank among those of the bin."""
    above = counts.flip(0).cumsum(0)
    place = int((above < rank).sum())
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
