"""What the launcher said: how many processes, how many threads. Knows no engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import yaml


def set_threads(asked: int | None) -> int:
    """Set and return the CPU threads of this process.

    What ``asked`` says; else OMP_NUM_THREADS where a person set it (launchers set it to 1 on their own account, which
    is not listened to); else the cores this process may use, divided among the processes of this machine.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if asked is not None:
        threads = asked
        if said.isdigit() and int(said) != asked and not launched():
            print(f"train.threads is {asked}, OMP_NUM_THREADS {said}: using {asked}", flush=True)
    elif said.isdigit() and int(said) > 0 and not launched():
        threads = int(said)
    else:
        threads = max(1, usable_cores() // local_world())
    torch.set_num_threads(threads)
    return threads


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> bool:
    """True under ``accelerate launch`` or ``torchrun``."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def local_world() -> int:
    """How many processes of this run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def asked_processes() -> int | None:
    """What the launcher was told.

    ``accelerate launch --cpu --num_processes 2`` starts one and says nothing: its command line is the only witness.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if not launched():
        return None
    words = _command_line(os.getppid())
    number = _after([word.replace("-", "_") for word in words], "__num_processes") or ""
    return int(number) if number.isdigit() else _of_config_file(_after(words, "--config_file"))


def _command_line(process: int) -> list[str]:
    """Options and values of a process, apart; empty where the system does not show them."""
    try:
        return _split(Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8").split("\0"))
    except OSError:
        return []


def _split(command: Sequence[str]) -> list[str]:
    return [part for word in command for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _after(words: Sequence[str], option: str) -> str | None:
    return next((value for word, value in pairwise(words) if word == option), None)


def _of_config_file(path: str | None) -> int | None:
    try:
        number = (yaml.safe_load(Path(path or "").read_text(encoding="utf-8")) or {}).get("num_processes")
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return number if isinstance(number, int) else None
