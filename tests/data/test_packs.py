"""Packs hold what was written into them, and one bad byte costs one entry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.data.packs import DAY, OPEN, Damaged, Packs, unused

Entries = dict[str, dict[str, Tensor]]
ENTRIES: Entries = {
    sha256(bytes([number])).hexdigest(): {
        "mean": torch.arange(6.0).view(2, 3) / (7 + number),
        "on": torch.tensor([True]),
    }
    for number in range(5)
}
NAMES = list(ENTRIES)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[label], second[label]) for label in first)


def header(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    found: dict[str, object] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def data_of(path: Path, tensor: str) -> int:
    """Where in the file a tensor begins."""
    content = path.read_bytes()
    return 8 + int.from_bytes(content[:8], "little") + header(path)[tensor]["data_offsets"][0]  # type: ignore[index]


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def whole(folder: Path) -> dict[str, bool]:
    """Of every entry, whether it is found and right; False where it is found and damaged."""
    packs, found = Packs(folder), {}
    for name in NAMES:
        if name in packs:
            try:
                assert same(packs.read(name), ENTRIES[name]), "a damaged entry was taken for a whole one"
                found[name] = True
            except Damaged:
                found[name] = False
    return found


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = Packs(tmp_path).write(ENTRIES)
    assert {f"{name}/{label}" for name in NAMES for label in ("mean", "on")} == header(path).keys() - {"__metadata__"}
    assert whole(tmp_path) == dict.fromkeys(NAMES, True)
    assert "f" * 64 not in Packs(tmp_path)
    with pytest.raises(KeyError):
        Packs(tmp_path).read("f" * 64)


def test_what_others_write_is_seen_after_a_look(tmp_path: Path) -> None:
    mine, other = Packs(tmp_path), Packs(tmp_path)
    assert NAMES[0] not in mine
    other.write({NAMES[0]: ENTRIES[NAMES[0]]})
    assert NAMES[0] in other and NAMES[0] not in mine
    mine.refresh()
    assert same(mine.read(NAMES[0]), ENTRIES[NAMES[0]])
    for path in tmp_path.iterdir():
        path.unlink()
    mine.refresh()
    assert NAMES[0] not in mine


def test_a_flipped_byte_anywhere_costs_no_more_than_it_must(tmp_path: Path) -> None:
    """In the data one entry; in the header one entry, or all of a pack that cannot be understood any more."""
    path = Packs(tmp_path).write(ENTRIES)
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    for at in range(len(good)):
        path.write_bytes(good)
        change(path, at)
        kept = sum(whole(tmp_path).values())
        if at >= data:
            assert kept == len(NAMES) - 1 and path.exists(), f"byte {at}"
        else:
            assert kept in (0, len(NAMES) - 1, len(NAMES)), f"byte {at} of the header"


@pytest.mark.parametrize("length", [0, 7, 40, 600, -1])
def test_a_pack_that_is_cut_short_is_removed(tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    path = Packs(tmp_path).write(ENTRIES)
    kept = Packs(tmp_path).write({"a" * 64: ENTRIES[NAMES[0]]})
    path.write_bytes(path.read_bytes()[:length])
    packs, other = Packs(tmp_path), Packs(tmp_path)
    assert (packs.refresh(), other.refresh()) == (1, 0)
    assert "is damaged" in caplog.text and str(path) in caplog.text
    assert list(tmp_path.iterdir()) == [kept] and "a" * 64 in packs and NAMES[0] not in packs


def test_a_pack_that_disappears_under_its_reader_is_a_damaged_entry(tmp_path: Path) -> None:
    Packs(tmp_path).write(ENTRIES)
    packs = Packs(tmp_path)
    assert NAMES[0] in packs
    packs._open.cache_clear()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Damaged):
        packs.read(NAMES[0])
    assert NAMES[0] not in packs


def test_the_newest_of_several_copies_counts(tmp_path: Path) -> None:
    old = Packs(tmp_path).write(ENTRIES)
    change(old, data_of(old, f"{NAMES[2]}/mean"))
    assert whole(tmp_path)[NAMES[2]] is False
    Packs(tmp_path).write({NAMES[2]: ENTRIES[NAMES[2]]})
    assert whole(tmp_path) == dict.fromkeys(NAMES, True)


def test_a_digest_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Packs(tmp_path).write(ENTRIES)
    packs = Packs(tmp_path)
    packs.read(NAMES[0])
    monkeypatch.setattr("finetune.data.packs._digest", lambda _: "wrong")
    packs.read(NAMES[0])
    with pytest.raises(Damaged):
        packs.read(NAMES[1])


MANY = """
import os, resource, sys, torch
from pathlib import Path
from finetune.data.packs import Packs
few = len(os.listdir("/proc/self/fd")) + 8
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
packs = Packs(Path(sys.argv[1]))
held = [packs.read(f"{number:064x}")["x"] for number in range(int(sys.argv[2]))]
assert [int(one[0]) for one in held] == list(range(len(held)))
"""


def test_more_packs_than_files_may_be_open(tmp_path: Path) -> None:
    packs, count = Packs(tmp_path), OPEN + 20
    for number in range(count):
        packs.write({f"{number:064x}": {"x": torch.tensor([number])}})
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path), str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_nobody_has_used_for_long_is_found(tmp_path: Path) -> None:
    read, old = (Packs(tmp_path / "latents").write({name: ENTRIES[name]}) for name in NAMES[:2])
    older = tmp_path / "latents" / "ab" / "ab12.safetensors"  # as they lay before there were packs
    older.parent.mkdir()
    older.write_bytes(b"")
    for path in (read, old, older):
        os.utime(path, (0, time.time() - 40 * DAY))
    assert unused(tmp_path, 30) == sorted([read, old, older])
    Packs(tmp_path / "latents").read(NAMES[0])
    assert unused(tmp_path, 30) == sorted([old, older])
