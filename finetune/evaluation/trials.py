"""Runs of recipes that are compared: each a process of its own, so that its time and its memory are its own.

A run that is finished is not run again; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from finetune import files
from finetune.errors import GuardError
from finetune.evaluation import protocol
from finetune.evaluation.protocol import Evaluation

COST = "cost.json"
One = TypeVar("One")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Outcome:
    """What came out of a run. ``seconds`` and ``peak_memory`` (bytes) are of the whole process."""

    seconds: float
    peak_memory: int
    evaluation: Evaluation


def run(name: str, command: Sequence[str], out: Path) -> Outcome:
    """Run ``command`` where it has not been; it must write its evaluation into ``out / name``.

    Raises:
        GuardError: the run failed, or wrote no evaluation.
    """
    folder = out / name
    if not ((folder / COST).is_file() and (folder / protocol.FILE).is_file()):
        log = out / f"{name}.log"
        began = time.perf_counter()
        code, peak = watched(command, log)
        if code or not (folder / protocol.FILE).is_file():
            what = f"ended with exit code {code}" if code else f"wrote no {protocol.FILE}"
            raise GuardError(f"study: run {name} {what}; see {log}")
        files.write_json(folder / COST, {"seconds": time.perf_counter() - began, "peak_memory": peak})
    cost = json.loads((folder / COST).read_text(encoding="utf-8"))
    return Outcome(cost["seconds"], cost["peak_memory"], Evaluation.read(folder))


def words(text: str) -> list[str]:
    """A command's list of names, with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """A command's list of seeds, with commas between them."""
    return [int(word) for word in words(text)]


def side_by_side(work: Callable[[One], Found], items: Sequence[One], jobs: int = 1) -> Iterator[Found]:
    """``work`` of every item, in their order, ``jobs`` of them at a time."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(work, items)


def watched(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Run a command with its output in ``log``; exit code and the most memory that it held, in bytes.

    Looked at while it runs: what the system remembers of an ended child may be the memory of the parent it began as.
    """
    peak = 0
    with log.open("wb") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, process.memory_info().rss)
            time.sleep(0.002 if peak < 2**24 else 0.05)  # a short run must not end before it has been looked at
    return process.returncode, peak
