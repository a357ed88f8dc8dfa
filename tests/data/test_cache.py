"""Entries are read only if they are what was written for exactly this content."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.data.cache import Store, key

NAME = key("test", one=1)
ENTRY = {"mean": torch.arange(12.0).view(3, 4) / 7, "mask": torch.tensor([True, False]), "number": torch.tensor(3)}


def made() -> dict[str, Tensor]:
    return dict(ENTRY)


def never() -> dict[str, Tensor]:
    raise AssertionError("the entry is there: nothing should be made")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[label], second[label]) for label in first)


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert same(store.get(NAME, made), ENTRY)
    assert same(store.get(NAME, never), ENTRY)  # from memory
    again = Store(tmp_path)
    assert same(again.get(NAME, never), ENTRY)  # from the disk
    assert (again.counts.read, again.counts.made) == (1, 0)


def test_memory_is_bounded(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=100)
    for number in range(5):
        store.get(key("test", number=number), lambda: {"x": torch.zeros(10)})
    assert store._bytes == 80
    assert same(store.get(key("test", number=4), never), {"x": torch.zeros(10)})  # read again from the disk


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
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: Any) -> None:
    path = Store(tmp_path).path(NAME)
    Store(tmp_path).get(NAME, made)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    store = Store(tmp_path)
    assert same(store.get(NAME, made), ENTRY)
    assert (store.counts.damaged, store.counts.made) == (1, 1)
    assert path.read_bytes() == whole


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    store, other = Store(tmp_path), key("test", one=2)
    store.get(NAME, made)
    store.path(other).parent.mkdir(exist_ok=True)
    store.path(NAME).rename(store.path(other))
    assert same(Store(tmp_path).get(other, lambda: {"x": torch.zeros(1)}), {"x": torch.zeros(1)})


def test_keys_tell_values_and_kinds_apart() -> None:
    names = [key("a", x=1), key("b", x=1), key("a", x=2), key("a", x="1"), key("a", x=True), key("a", y=1)]
    assert len(set(names)) == len(names)


def fill(folder: Path, start: Any) -> None:
    start.wait()
    store = Store(folder)
    for number in range(40):
        store.get(key("race", number=number), lambda number=number: {"x": torch.full((500,), float(number))})


def test_two_processes_that_fill_one_folder_leave_whole_entries(tmp_path: Path) -> None:
    context = get_context("fork" if hasattr(os, "fork") else "spawn")
    start = context.Event()
    workers = [context.Process(target=fill, args=(tmp_path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    store = Store(tmp_path)
    for number in range(40):
        assert same(store.get(key("race", number=number), never), {"x": torch.full((500,), float(number))})
    assert not list(tmp_path.rglob(".partial-*"))
