"""Processes that share a folder: how they start, and how the main one shows how far it is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import track

from finetune.config.schema import TrainConfig
from finetune.distributed import Processes, start

T = TypeVar("T")
Device = Literal["auto", "cpu"]


def join(device: Device) -> Processes:
    """Join the processes of a launcher. What they are is said on stderr, since results go to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        return start(TrainConfig(device=device))


def shown(items: Iterable[T], what: str, processes: Processes) -> Iterator[T]:
    """``items``, with a line on the main process's stderr that says how many there have been."""
    for number, item in enumerate(
        track(items, what, transient=True, console=Console(stderr=True), disable=not processes.is_main), 1
    ):
        processes.doing(f"{what}: {number}")
        yield item
