"""Entries are read only if they are what was written for exactly this content, and what is made is kept in packs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, at_once
from torch import Tensor

from finetune.data import cache
from finetune.data.cache import Make, Store, key
from finetune.data.packs import PATTERN
from finetune.data.processes import Alone
from finetune.errors import UserError

NAME = key("test", one=1)
ENTRY = {"mean": torch.arange(12.0).view(3, 4) / 7, "mask": torch.tensor([True, False]), "number": torch.tensor(3)}
NAMES = [key("test", number=number) for number in range(40)]


def made() -> dict[str, Tensor]:
    return dict(ENTRY)


def never() -> dict[str, Tensor]:
    raise AssertionError("the entry is there: nothing should be made")


def numbered(number: int) -> dict[str, Tensor]:
    return {"x": torch.full((500,), float(number))}


def wanted(count: int = len(NAMES)) -> dict[str, Make]:
    return {name: partial(numbered, number) for number, name in enumerate(NAMES[:count])}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[label], second[label]) for label in first)


def packs(folder: Path) -> list[Path]:
    return sorted(folder.glob(PATTERN))


def all_there(folder: Path, numbers: Iterable[int] = range(len(NAMES))) -> bool:
    store = Store(folder)
    return all(same(store.get(NAMES[number], never), numbered(number)) for number in numbers)


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert same(store.get(NAME, made), ENTRY)
    assert same(store.get(NAME, never), ENTRY)
    again = Store(tmp_path)
    assert same(again.get(NAME, never), ENTRY) and same(again.get(NAME, never), ENTRY)
    assert (again.counts.read, again.counts.made) == (1, 0)


def test_without_a_folder_everything_is_made_each_time() -> None:
    store = Store(None)
    assert same(store.get(NAME, made), store.get(NAME, made))
    assert store.counts.made == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"not a tensor file at all",
        lambda content: content + b"more",
    ],
    ids=["empty", "header alone", "cut short", "one bit", "text", "longer"],
)
def test_a_damaged_entry_is_made_again_and_not_a_third_time(tmp_path: Path, damage: Any) -> None:
    Store(tmp_path).get(NAME, made)
    (path,) = packs(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    store = Store(tmp_path)
    store.fill({NAME: made}, Alone(), "")
    assert (store.counts.damaged, store.counts.made) == (1, 1)
    assert same(store.get(NAME, never), ENTRY)
    again = Store(tmp_path)
    again.fill({NAME: never}, Alone(), "")
    assert (again.counts.damaged, again.counts.read) == (0, 1)


def test_a_damaged_entry_leaves_its_neighbours_in_use(tmp_path: Path) -> None:
    Store(tmp_path).fill(wanted(), Alone(), "")
    (path,) = packs(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    store = Store(tmp_path)
    store.fill(wanted(), Alone(), "")
    assert (store.counts.read, store.counts.made, store.counts.damaged) == (39, 1, 1)
    assert all_there(tmp_path)


def test_a_pack_is_bounded_in_bytes_in_entries_and_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "one").fill(wanted(), Alone(), "")
    for name, limit in (("PACK_BYTES", 20_000), ("PACK_ENTRIES", 10), ("PACK_SECONDS", 0.0)):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, limit)
            Store(tmp_path / name).fill(wanted(), Alone(), "")
    counts = [len(packs(tmp_path / name)) for name in ("one", "PACK_BYTES", "PACK_ENTRIES", "PACK_SECONDS")]
    assert counts == [1, 4, 4, 40]


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    Store(tmp_path).fill(wanted(30), Alone(), "")
    store = Store(tmp_path)
    store.fill(wanted(), Alone(), "")
    assert (store.counts.read, store.counts.made) == (30, 10)


def test_what_was_made_before_an_error_is_kept(tmp_path: Path) -> None:
    def broken() -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Store(tmp_path).fill({**wanted(7), NAME: broken}, Alone(), "")
    assert all_there(tmp_path, range(7))


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file in its place")
    with pytest.raises(UserError, match=r"latents: cannot be written into .*choose another data.cache.folder"):
        Store(tmp_path / "latents").get(NAME, made)


def test_keys_tell_values_and_kinds_apart() -> None:
    names = [key("a", x=1), key("b", x=1), key("a", x=2), key("a", x="1"), key("a", x=True), key("a", y=1)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shared_disk", [True, False])
def test_processes_share_the_work_of_what_they_can_see(tmp_path: Path, shared_disk: bool) -> None:
    """Of one disk each entry is made once; of two machines with a disk each, once on each."""
    stores = [Store(tmp_path / ("all" if shared_disk else f"machine {rank // 2}")) for rank in range(4)]

    def fill(processes: Rank) -> None:
        stores[processes.rank].fill(wanted(), processes, "")

    at_once(fill, world=4, per_machine=2)
    assert [store.counts.made for store in stores] == ([10] * 4 if shared_disk else [20] * 4)
    assert all(name in store for store in stores for name in NAMES)
    assert all(all_there(folder) for folder in tmp_path.iterdir())


def fill(folder: Path, start: Any) -> None:
    start.wait()
    store = Store(folder)
    for number, name in enumerate(NAMES):
        store.get(name, partial(numbered, number))


def test_two_runs_that_fill_one_folder_leave_whole_entries(tmp_path: Path) -> None:
    context = get_context("fork" if hasattr(os, "fork") else "spawn")
    start = context.Event()
    workers = [context.Process(target=fill, args=(tmp_path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    assert all_there(tmp_path)
    assert not list(tmp_path.rglob(".partial-*"))


BUILD = """
import sys, time, torch
from functools import partial
from pathlib import Path
from finetune.data import cache
from finetune.data.processes import Alone
cache.PACK_ENTRIES = 8
def slow(number):
    time.sleep(0.001)
    return {"x": torch.full((20_000,), float(number))}
names = [cache.key("killed", number=number) for number in range(200)]
print("begins", flush=True)
cache.Store(Path(sys.argv[1])).fill({n: partial(slow, i) for i, n in enumerate(names)}, Alone(), "")
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_build_that_is_killed_loses_no_more_than_a_pack(tmp_path: Path, seed: int) -> None:
    names = [key("killed", number=number) for number in range(200)]
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], stdout=subprocess.PIPE)
    assert build.stdout is not None and build.stdout.readline() == b"begins\n"
    time.sleep(random.Random(seed).uniform(0.02, 0.5))
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    kept = Store(tmp_path)
    there = [name in kept for name in names]
    assert there == sorted(there, reverse=True) and sum(there) % 8 == 0, "packs are whole, in the order of the build"
    second = Store(tmp_path)
    full = {
        name: lambda number=number: {"x": torch.full((20_000,), float(number))} for number, name in enumerate(names)
    }
    second.fill(full, Alone(), "")
    assert (second.counts.made, second.counts.damaged) == (len(names) - sum(there), 0)
    assert all(same(Store(tmp_path).get(name, never), make()) for name, make in full.items())
    for leftover in tmp_path.glob(".partial-*"):
        os.utime(leftover, (0, 0))
    cache.remove_stale(tmp_path)
    assert all(path.name.startswith("pack-") for path in tmp_path.iterdir())
