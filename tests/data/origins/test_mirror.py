"""A remote folder is the local one: what changed is fetched, what is gone goes, what breaks off leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from packed import captions_of, contents, looked

from finetune.data.origins.mirror import _split

Folder = Callable[..., Path]


@pytest.fixture
def remote(folder: Folder) -> Iterator[MemoryFileSystem]:
    """Three pictures with captions at memory://bucket/rex."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for name, content in contents(folder(3)):
        fs.pipe(f"/bucket/rex/{name}", content)
    yield fs
    fs.store.clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are fetched."""
    names: list[str] = []
    first = MemoryFileSystem.get_file

    def get_file(self: Any, rpath: str, lpath: str, **keys: Any) -> Any:
        names.append(rpath.rpartition("/")[2])
        return first(self, rpath, lpath, **keys)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return names


def test_only_what_changed_is_fetched_again(remote: MemoryFileSystem, fetched: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = looked(cache, folder="memory://bucket/rex")
    assert sorted(fetched) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]
    fetched.clear()
    assert looked(cache, folder="memory://bucket/rex") == first
    assert fetched == []
    remote.pipe("/bucket/rex/1.txt", b"another caption")
    remote.pipe("/bucket/rex/3.png", remote.cat("/bucket/rex/2.png"))
    remote.rm("/bucket/rex/0.png")
    found = looked(cache, folder="memory://bucket/rex", prompt="p")
    assert sorted(fetched) == ["1.txt", "3.png"]
    assert [picture.id for picture in found.concepts[0].pictures] == ["0/1.png", "0/2.png", "0/3.png"]
    assert captions_of(found) == ["another caption", "a photo of zib number 2", "p"]


def test_a_damaged_or_missing_copy_is_fetched_again(
    remote: MemoryFileSystem, fetched: list[str], tmp_path: Path
) -> None:
    found = looked(tmp_path / "cache", folder="memory://bucket/rex")
    paths = [Path(str(picture.path)) for picture in found.concepts[0].pictures]
    paths[0].unlink()
    paths[1].write_bytes(b"short")
    fetched.clear()
    assert looked(tmp_path / "cache", folder="memory://bucket/rex") == found
    assert sorted(fetched) == ["0.png", "1.png"]


def test_an_interrupted_fetch_leaves_nothing_half_written_and_goes_on(
    remote: MemoryFileSystem, fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MemoryFileSystem.get_file

    def breaks(self: Any, rpath: str, lpath: str, **keys: Any) -> None:
        if rpath.endswith("2.png"):
            Path(lpath).write_bytes(b"half")
            raise ConnectionResetError("gone")
        first(self, rpath, lpath, **keys)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "get_file", breaks)
        found = looked(tmp_path / "cache", folder="memory://bucket/rex")
    assert found.problems == ["data.concepts[0].folder: memory://bucket/rex cannot be read: ConnectionResetError: gone"]
    there = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "2.png" not in there and not [name for name in there if "partial" in name]
    fetched.clear()
    assert len(looked(tmp_path / "cache", folder="memory://bucket/rex").concepts[0].pictures) == 3
    assert "2.png" in fetched and "0.png" not in fetched


def test_a_file_that_comes_short_is_refused(
    remote: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, rpath, lpath, **_: Path(lpath).write_bytes(b"x"))
    (problem,) = looked(tmp_path / "cache", folder="memory://bucket/rex").problems
    assert "broke off after 1 of" in problem


def test_metadata_name_pictures_below_and_masks_have_a_url_too(remote: MemoryFileSystem, tmp_path: Path) -> None:
    remote.pipe("/bucket/rex/metadata.csv", b"file_name,text\nmore/x.png,below\n")
    remote.pipe("/bucket/rex/more/x.png", remote.cat("/bucket/rex/0.png"))
    remote.pipe("/bucket/rex/more/y.png", remote.cat("/bucket/rex/0.png"))
    remote.pipe("/bucket/rex/big.safetensors", b"weights")
    for name in ("0", "1", "2", "x"):
        remote.pipe(f"/bucket/masks/{name}.png", remote.cat("/bucket/rex/0.png"))
    found = looked(tmp_path / "cache", folder="memory://bucket/rex", masks="memory://bucket/masks", prompt="p")
    assert found.problems == []
    pictures = {picture.id: picture for picture in found.concepts[0].pictures}
    assert list(pictures) == ["0/0.png", "0/1.png", "0/2.png", "0/more/x.png"]
    assert pictures["0/more/x.png"].captions == ("below",)
    assert pictures["0/more/x.png"].mask.name == "x.png"  # type: ignore[union-attr]
    assert "memory://bucket/rex: 2 entries ignored: big.safetensors, more" in found.concepts[0].notes
    assert not list((tmp_path / "cache").rglob("big.safetensors"))


def test_a_file_url_works_like_any_other(folder: Folder, tmp_path: Path) -> None:
    path = folder(2, "10_zib star", captions=False)
    found = looked(tmp_path / "cache", folder=f"file://{path}", captions="folder")
    assert captions_of(found) == ["zib star", "zib star"]
    assert found.concepts[0].config.repeats == 10


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"folder": "memory://bucket/rexx"}, "folder: memory://bucket/rexx does not exist"),
        ({"folder": "s3://bucket/rex"}, "folder: s3://bucket/rex needs a library that is not installed: Install s3fs"),
        ({"folder": "nosuch://bucket/rex"}, "folder: nosuch://bucket/rex cannot be read: Protocol not known"),
        ({"shards": "memory://bucket/rex/*.tar"}, "shards: memory://bucket/rex/*.tar does not exist, or holds nothing"),
        ({"shards": "s3://bucket/{0..1}.tar"}, "shards: s3://bucket/0.tar needs a library"),
        ({"dataset": {"path": "s3://bucket/a.parquet"}}, "dataset.path: s3://bucket/a.parquet needs a library"),
        ({"dataset": {"path": "s3://bucket/a"}}, "must name Parquet files, such as s3://bucket/a/*.parquet"),
    ],
)
def test_what_cannot_be_reached_is_named_with_its_key(
    remote: MemoryFileSystem, tmp_path: Path, source: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    (problem,) = looked(tmp_path / "cache", **source).problems
    assert problem.startswith("data.concepts[0].") and said in problem


def test_names_that_lead_elsewhere_are_refused(
    remote: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"name": "/bucket/rex/..", "size": 1, "type": "file"}
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: [entry])
    (problem,) = looked(tmp_path / "cache", folder="memory://bucket/rex").problems
    assert "a name that is none: '..'" in problem


def test_what_a_web_address_asks_for_is_no_part_of_a_name() -> None:
    assert _split("https://host/data/0.tar?X-Sign=a/b") == ("https://host/data", "0.tar")
    assert _split("bucket/what?/0.tar") == ("bucket/what?", "0.tar")
