"""Files that are whole or absent, whatever interrupts the writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.files import (
    PARTIAL,
    remove_partial,
    replacing,
    replacing_folder,
    sha256,
    stream_tensors,
    write_json,
    write_tensors,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["b.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_folder_is_replaced_as_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for content in ("first", "second"):
        with replacing_folder(path) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / content).write_text(content)
            assert not (path / "deep" / content).exists()
    assert names(path / "deep") == ["second"]
    assert names(tmp_path) == ["run"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with replacing_folder(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), replacing_folder(path) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError("stop")
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_what_a_killed_writer_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}12345678-a.txt").write_text("half")
    (tmp_path / f"{PARTIAL}12345678-run").mkdir()
    (tmp_path / f"{PARTIAL}12345678-run" / "a").write_text("half")
    (tmp_path / "kept.txt").write_text("mine")
    remove_partial(tmp_path)
    remove_partial(tmp_path / "absent")
    assert names(tmp_path) == ["kept.txt"]


def test_json_is_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "ö"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": "ö", "b": 1}
    assert text.index('"a": "ö"') < text.index('"b"')
    assert text.endswith("\n")


def test_tensors_come_back_and_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(2.0, dtype=torch.bfloat16)}
    metadata = {f"key{index}": "ä" * index for index in range(20)}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, metadata)
    back = load_file(tmp_path / "one")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")


def test_a_stream_of_tensors_is_the_file_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6.0).view(2, 3).T,
        "a": torch.tensor(2.0, dtype=torch.bfloat16),
        "c": torch.zeros(0),
        "d": torch.ones(3, dtype=torch.float16),
    }
    metadata = {"key": "ä"}
    write_tensors(tmp_path / "one", tensors, metadata)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    blanks = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    stream_tensors(tmp_path / "two", blanks, read, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(asked) == sorted(tensors), "each is read once"
    back = load_file(tmp_path / "two")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_stream_that_breaks_its_promise_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not what was promised"):
        stream_tensors(tmp_path / "a", {"x": torch.zeros(2)}, lambda _: torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_sha256_is_the_usual_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_are_for_whom_other_files_are_and_leave_nothing_but_what_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes files for their owner alone, under temporary names that no one would remove."""
    write_text(tmp_path / "a.txt", "text")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode
    during: list[str] = []

    def killed(_: object, path: Path, **__: object) -> None:
        (path.parent / ".tmpAbCdEf").write_bytes(b"half")
        during.extend(names(tmp_path))

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    assert all(name.startswith(PARTIAL) for name in set(during) - {"a.txt", "a.safetensors"})
