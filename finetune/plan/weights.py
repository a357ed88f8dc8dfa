"""The tensors of a run, and how the engines cut them: N processes; a tensor of n numbers in pieces of ceil(n / N)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from finetune.plan.launches import Launch

FLOAT = 4  # bytes; what trains, its gradients and what the optimizer remembers
ALIGNED = 2  # numbers; ZeRO-1 and 2 fill a group's line of weights up to a multiple of this and N


@dataclass(frozen=True)
class Weight:
    """One tensor of a run.

    Attributes:
        itemsize: bytes a number.
        group: of the optimizer; None where it is frozen.
        dealt: whether it is in a network that ZeRO-3 and FSDP2 deal out, which others hold whole.
        unit: the block that FSDP2 gathers it with; None where that is the network as a whole.
    """

    shape: tuple[int, ...]
    itemsize: int = FLOAT
    group: str | None = None
    dealt: bool = True
    unit: str | None = None

    @property
    def numbers(self) -> int:
        """N."""
        return math.prod(self.shape)


def trains(one: Weight) -> bool:
    """Whether the optimizer moves it."""
    return one.group is not None


def frozen(one: Weight) -> bool:
    """Whether nothing moves it."""
    return one.group is None


def by_size(weights: Iterable[Weight], launch: Launch) -> tuple[list[Weight], list[Weight]]:
    """What ZeRO-3 deals out and keeps whole besides, as it is small, and the rest of what it deals out."""
    dealt = [one for one in weights if one.dealt]
    small = [one for one in dealt if one.numbers <= launch.persistent]
    return small, [one for one in dealt if one.numbers > launch.persistent]


def grouped(weights: Iterable[Weight]) -> dict[str, list[int]]:
    """Numbers of each tensor, in the order that they have in the optimizer's groups."""
    groups: dict[str, list[int]] = defaultdict(list)
    for one in weights:
        if one.group is not None:
            groups[one.group].append(one.numbers)
    return groups


def bytes_of(weights: Iterable[Weight], wanted: Callable[[Weight], bool]) -> int:
    """Of the tensors that are wanted, each whole."""
    return sum(one.numbers * one.itemsize for one in weights if wanted(one))


def whole(weights: Iterable[Weight], world: int) -> int:
    """Bytes of tensors that are gathered, padding included."""
    return sum(padded(one.numbers, world) * one.itemsize for one in weights)


def piece(one: Weight, world: int) -> int:
    """Numbers of a tensor that a process has under ZeRO-3."""
    return -(-one.numbers // world)


def row(one: Weight, world: int) -> int:
    """Numbers in the rows of a tensor that a process has."""
    first, *rest = one.shape
    return -(-first // world) * math.prod(rest)


def padded(numbers: int, multiple: int) -> int:
    """``numbers``, up to a multiple."""
    return -(-numbers // multiple) * multiple
