"""Which picture is drawn when: a pure function of the seed and the number of the draw, so its state is an integer.

The order is endless and of one piece: draw ``n`` is place ``n % N`` of epoch ``n // N``, and the batch of optimizer
step ``k`` is the draws from ``k G`` to ``(k + 1) G``. A batch may begin in one epoch and end in the next, so nothing is
dropped, and any step can be begun at. Processes share out the draws of a step, so their number changes nothing.

Where pictures differ in size, those of one size stand together in an epoch (``Grouped``), as many as a step has: what
can be computed together is, and nothing else about the order changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from finetune.randomness import permutation

CLASS_ORDER, MIXED_ORDER = "class order", "mixed order"  # purposes


class Drawn(NamedTuple):
    """A draw of the endless order; ``epoch`` is that of the subjects."""

    number: int
    item: int  # index among the subjects' pictures, or among the class's
    prior: bool  # which of the two
    epoch: int


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


class Places(Protocol):
    """Every place once per epoch, in some order."""

    def __getitem__(self, number: int) -> int:
        """The place of draw ``number``."""
        ...


class Grouped:
    """As ``Shuffled``, but places of one size stand together, ``unit`` at a time.

    What is left of each size, less than ``unit``, stands at the ends of the epoch: first as many as complete the unit
    that the epoch before has begun, so that whole units are never cut in two by the end of a step.

    Args:
        length: N, places per epoch.
        unit: G, draws per optimizer step.
        size: of the picture at a place of an epoch.
        seed: the run's.
        purpose: keeps apart several orders of one run.
    """

    def __init__(
        self, length: int, unit: int, size: Callable[[int, int], tuple[int, int]], seed: int, purpose: str = "order"
    ) -> None:
        self.length, self.unit, self.size, self.seed, self.purpose = length, unit, size, seed, purpose
        self._arranged = lru_cache(maxsize=4)(self._arrange)

    def __getitem__(self, number: int) -> int:
        """The place of draw ``number``."""
        epoch, position = divmod(number, self.length)
        return self._arranged(epoch)[position]

    def _arrange(self, epoch: int) -> Sequence[int]:
        groups: dict[tuple[int, int], list[int]] = {}
        for place in permutation(self.length, self.seed, self.purpose, epoch):
            groups.setdefault(self.size(epoch, place), []).append(place)
        units, rest = [], []
        for places in groups.values():
            whole = len(places) // self.unit * self.unit
            units += [places[start : start + self.unit] for start in range(0, whole, self.unit)]
            rest += places[whole:]
        first = -epoch * self.length % self.unit
        while len(rest) < first and units:
            rest += units.pop()
        turns = permutation(len(units), self.seed, f"{self.purpose} of units", epoch)
        return array("q", [*rest[:first], *(place for turn in turns for place in units[turn]), *rest[first:]])


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
    """Subjects alone.

    Args:
        places: the order of an epoch's places; any, where none is given.
    """

    items: Items
    seed: int
    places: Places | None = None

    def at(self, number: int) -> Sequence[Drawn]:
        """One picture of a subject."""
        length = len(self.items)
        place, epoch = (self.places or Shuffled(length, self.seed))[number], number // length
        return [Drawn(number, self.items.of(epoch, place), prior=False, epoch=epoch)]


@dataclass(frozen=True)
class Pairwise:
    """With every picture of a subject one of the class, from an order of its own of ``classes`` pictures.

    Args:
        places, class_places: the orders of both; any, where none is given.
    """

    items: Items
    classes: int
    seed: int
    places: Places | None = None
    class_places: Places | None = None

    def at(self, number: int) -> Sequence[Drawn]:
        """A picture of a subject and one of the class."""
        shown = (self.class_places or Shuffled(self.classes, self.seed, CLASS_ORDER))[number]
        (subject,) = Plain(self.items, self.seed, self.places).at(number)
        return [subject, Drawn(number, shown, prior=True, epoch=subject.epoch)]


@dataclass(frozen=True)
class Mixed:
    """Class pictures among the subjects', as many of one as of the other in every epoch.

    An epoch takes the next ``len(items)`` pictures from an endless order of the class, so that all of them have their
    turn however few the subjects' are.

    Args:
        places: the order of an epoch's ``2 len(items)`` places; any, where none is given.
    """

    items: Items
    classes: int
    seed: int
    places: Places | None = None

    def at(self, number: int) -> Sequence[Drawn]:
        """A picture of a subject or one of the class."""
        length = 2 * len(self.items)
        place = (self.places or Shuffled(length, self.seed, MIXED_ORDER))[number]
        return [self.placed(number, number // length, place)]

    def placed(self, number: int, epoch: int, place: int) -> Drawn:
        """What stands at a place of an epoch: subjects in the first half."""
        half = len(self.items)
        if place < half:
            return Drawn(number, self.items.of(epoch, place), prior=False, epoch=epoch)
        turn = epoch * half + place - half
        return Drawn(number, Shuffled(self.classes, self.seed, CLASS_ORDER)[turn], prior=True, epoch=epoch)


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
