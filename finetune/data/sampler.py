"""Which picture is drawn when: a pure function of the seed and the number of the draw, so its state is an integer.

The order is endless and of one piece: draw ``n`` is place ``n % N`` of epoch ``n // N``, and the batch of optimizer
step ``k`` is the draws from ``k G`` to ``(k + 1) G``. A batch may begin in one epoch and end in the next, so nothing is
dropped, and any step can be begun at. Processes share out the draws of a step, so their number changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from finetune.randomness import permutation


class Drawn(NamedTuple):
    """A draw of the endless order."""

    number: int
    item: int  # index among the subjects' pictures, or among the class's
    prior: bool  # which of the two


class Order(Protocol):
    """An endless order of pictures."""

    def at(self, number: int) -> Sequence[Drawn]:
        """What draw ``number`` brings."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every one of ``length`` places once per epoch, each epoch in an order of its own.

    Args:
        length: N, places per epoch.
        seed: the run's.
        purpose: keeps apart several orders of one run.
    """

    length: int
    seed: int
    purpose: str = "order"

    def __getitem__(self, number: int) -> int:
        """The place of draw ``number``."""
        epoch, position = divmod(number, self.length)
        return _epoch(self.length, self.seed, self.purpose, epoch)[position]


@lru_cache(maxsize=64)
def _epoch(length: int, seed: int, purpose: str, epoch: int) -> Sequence[int]:
    return permutation(length, seed, purpose, epoch)


class Items(Protocol):
    """Which picture stands at each place of an epoch."""

    def __len__(self) -> int:
        """Places of an epoch."""
        ...

    def of(self, epoch: int, place: int) -> int:
        """The picture, as an index among the subjects'."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same pictures in every epoch, repeats included."""

    items: Sequence[int]

    def __len__(self) -> int:
        """Places of an epoch."""
        return len(self.items)

    def of(self, epoch: int, place: int) -> int:
        """The picture of a place, whatever the epoch."""
        return self.items[place]


@dataclass(frozen=True)
class Balanced:
    """As many places for every concept, however many pictures it has.

    An epoch has ``max(len(group))`` places for each concept. A concept with fewer pictures takes the next ones of an
    endless order of its own, so that all of its pictures have their turn equally often.

    Args:
        groups: the pictures of each concept.
        seed: the run's.
    """

    groups: Sequence[Sequence[int]]
    seed: int

    def __len__(self) -> int:
        """Places of an epoch."""
        return self._each * len(self.groups)

    def of(self, epoch: int, place: int) -> int:
        """The picture of a place; places ``c n`` to ``(c + 1) n`` are those of concept ``c``."""
        concept, turn = divmod(place, self._each)
        group = self.groups[concept]
        return group[Shuffled(len(group), self.seed, f"order of concept {concept}")[epoch * self._each + turn]]

    @property
    def _each(self) -> int:
        return max(map(len, self.groups))


@dataclass(frozen=True)
class Plain:
    """Subjects alone."""

    items: Items
    seed: int

    def at(self, number: int) -> Sequence[Drawn]:
        """One picture of a subject."""
        length = len(self.items)
        place = Shuffled(length, self.seed)[number]
        return [Drawn(number, self.items.of(number // length, place), prior=False)]


@dataclass(frozen=True)
class Pairwise:
    """With every picture of a subject one of the class, from an order of its own of ``classes`` pictures."""

    items: Items
    classes: int
    seed: int

    def at(self, number: int) -> Sequence[Drawn]:
        """A picture of a subject and one of the class."""
        shown = Shuffled(self.classes, self.seed, "class order")[number]
        return [*Plain(self.items, self.seed).at(number), Drawn(number, shown, prior=True)]


@dataclass(frozen=True)
class Mixed:
    """Class pictures among the subjects', as many of one as of the other in every epoch.

    An epoch takes the next ``len(items)`` pictures from an endless order of the class, so that all of them have their
    turn however few the subjects' are.
    """

    items: Items
    classes: int
    seed: int

    def at(self, number: int) -> Sequence[Drawn]:
        """A picture of a subject or one of the class."""
        half = len(self.items)
        epoch = number // (2 * half)
        place = Shuffled(2 * half, self.seed, "mixed order")[number]
        if place < half:
            return [Drawn(number, self.items.of(epoch, place), prior=False)]
        turn = epoch * half + place - half
        return [Drawn(number, Shuffled(self.classes, self.seed, "class order")[turn], prior=True)]


@dataclass(frozen=True)
class Share:
    """The draws that one process takes.

    Args:
        batch: draws per process and forward pass.
        accumulation: forward passes per optimizer step.
        rank, world: this process, of how many.
    """

    batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def per_step(self) -> int:
        """G: draws per optimizer step, over all processes."""
        return self.batch * self.accumulation * self.world

    def draws(self, step: int, part: int) -> range:
        """Numbers of the draws of this process in forward pass ``part`` of optimizer step ``step``."""
        start = step * self.per_step + (part * self.world + self.rank) * self.batch
        return range(start, start + self.batch)
