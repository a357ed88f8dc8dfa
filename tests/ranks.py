"""The processes of a run played by one: as they are before anything is sent between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from finetune.data.processes import Alone


@dataclass(frozen=True)
class Rank(Alone):
    """One of several processes. At a barrier it waits only where it has a ``gate``."""

    gate: threading.Barrier | None = None

    def barrier(self) -> None:
        if self.gate:
            self.gate.wait(20)


def ranks(world: int, per_machine: int | None = None, gate: threading.Barrier | None = None) -> list[Rank]:
    """All processes of a run: of one machine, or ``per_machine`` to each."""
    local = per_machine or world
    return [Rank(rank, world, rank % local, local, gate) for rank in range(world)]


def at_once(work: Callable[[Rank], object], world: int, per_machine: int | None = None) -> None:
    """Have every process do ``work`` in a thread of its own, and raise what the first one raised that has failed."""
    gate = threading.Barrier(world)
    failed: list[BaseException] = []

    def do(rank: Rank) -> None:
        try:
            work(rank)
        except BaseException as error:
            failed.append(error)  # before the others, which then no longer wait
            gate.abort()

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(do, ranks(world, per_machine, gate)))
    if failed:
        raise failed[0]
