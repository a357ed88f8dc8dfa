"""The little that data needs to know of the other processes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run, as seen by one of them."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    @property
    def local_rank(self) -> int:
        """Which one this is on its machine, from 0."""
        ...

    @property
    def local_world(self) -> int:
        """How many share the machine."""
        ...

    def barrier(self) -> None:
        """Wait until all processes are here."""
        ...

    def doing(self, text: str) -> None:
        """Say what this process works on: what others are told that wait for it."""
        ...


@dataclass(frozen=True)
class Alone:
    """A run of one process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def doing(self, text: str) -> None:
        """Nobody to tell."""


def told(items: Sequence[T], title: str, processes: Processes) -> Iterator[T]:
    """``items``, while others are told how far this process is: ``title: 14 of 200``."""
    for number, item in enumerate(items, 1):
        processes.doing(f"{title}: {number} of {len(items)}")
        yield item
