"""Work that other threads do ahead of whoever takes its results, in order and never much of it. No torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    pool: Executor, call: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Generator[tuple[Item, Future[Result]]]:
    """``call`` of each item as it is computed by ``pool``, in the order of the items. Close it to stop early.

    Args:
        most: calls that are under way or waiting to be taken at any time; ``items`` is read no further than they are.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            if len(waiting) == most:
                yield waiting.popleft()
            waiting.append((item, pool.submit(call, item)))
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def cores() -> int:
    """CPU cores for this process: those it may use, shared with the other processes of its run on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
