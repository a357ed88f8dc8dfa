"""A stream is passed over once: what is kept is not fetched again, and what breaks off goes on."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packed import captions_of, looked, records

Folder = Callable[..., Path]


class Stream:
    """An ``IterableDataset`` that counts what is taken from it, and breaks where it is told to."""

    features = None

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.taken, self.first, self.breaks = rows, [], 0, -1

    def skip(self, first: int) -> Stream:
        self.first = first
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in itertools.islice(enumerate(self.rows), self.first, None):
            if number == self.breaks:
                raise ConnectionResetError("gone")
            self.taken.append(number)
            yield row


@pytest.fixture
def stream(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Five rows on the hub."""
    found = Stream(records(folder(5)))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
    return found


def kept(tmp_path: Path, limit: int, **keys: Any) -> Any:
    dataset = {"path": "someone/dogs", "streaming": True, "limit": limit, **keys.pop("dataset", {})}
    return looked(tmp_path / "cache", dataset=dataset, **keys)


def test_what_is_kept_is_not_fetched_again(stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept(tmp_path, 3)
    assert captions_of(first) == [f"a photo of zib number {number}" for number in range(3)]
    assert stream.taken == [0, 1, 2]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked again"))
    assert kept(tmp_path, 3).concepts[0].pictures == first.concepts[0].pictures
    assert kept(tmp_path, 2).concepts[0].pictures == first.concepts[0].pictures[:2]


def test_a_larger_limit_adds_and_the_end_is_remembered(stream: Stream, tmp_path: Path) -> None:
    kept(tmp_path, 2)
    assert len(kept(tmp_path, 4).concepts[0].pictures) == 4
    assert stream.taken == [0, 1, 2, 3]
    for _ in range(2):
        assert len(kept(tmp_path, 100).concepts[0].pictures) == 5
    assert stream.taken == [0, 1, 2, 3, 4]


def test_a_stream_that_broke_off_goes_on_where_it_stopped(stream: Stream, tmp_path: Path) -> None:
    whole = kept(tmp_path / "whole", 5).concepts[0].pictures
    stream.taken.clear()
    stream.breaks = 3
    (problem,) = kept(tmp_path, 5).problems
    assert problem == (
        "someone/dogs: the stream broke off (ConnectionResetError: gone); 3 of 5 rows are kept, and the next run goes "
        "on there"
    )
    stream.breaks = -1
    pictures = kept(tmp_path, 5).concepts[0].pictures
    assert stream.taken == [0, 1, 2, 3, 4]
    assert [(one.id, one.captions, one.facts) for one in pictures] == [
        (one.id, one.captions, one.facts) for one in whole
    ]


def test_a_record_that_was_cut_off_and_a_file_that_is_gone_are_fetched_again(stream: Stream, tmp_path: Path) -> None:
    first = kept(tmp_path, 5)
    (journal,) = (tmp_path / "cache").rglob("fetched.jsonl")
    journal.write_bytes(journal.read_bytes()[:-30])
    stream.taken.clear()
    assert kept(tmp_path, 5) == first
    assert stream.taken == [4]
    Path(str(first.concepts[0].pictures[2].path)).unlink()
    assert kept(tmp_path, 5) == first


def test_bad_rows_are_named_and_can_be_skipped(stream: Stream, tmp_path: Path) -> None:
    stream.rows[1]["image"] = None
    stream.rows[2]["image"] = {"bytes": b"nothing", "path": None}
    stream.rows[3]["text"] = 5
    found = kept(tmp_path, 5)
    assert "someone/dogs: row 1: the column 'image' has no picture" in found.problems[0]
    assert "someone/dogs: row 3: text must be a caption" in found.problems[1]
    assert "00000002-" in found.problems[2] and "is not a picture" in found.problems[2]
    again = kept(tmp_path, 5, dataset={"skip": [1, 2, 3]})
    assert again.problems == [] and [one.id for one in again.concepts[0].pictures] == ["0/0", "0/4"]
    assert stream.taken == [0, 1, 2, 3, 4]


def test_a_missing_column_is_named(stream: Stream, tmp_path: Path) -> None:
    (problem,) = kept(tmp_path, 5, dataset={"text": "caption"}).problems
    assert problem == "data.concepts[0].dataset: someone/dogs: row 0 has no column 'caption'"


def test_another_revision_is_another_stream(stream: Stream, tmp_path: Path) -> None:
    kept(tmp_path, 2)
    kept(tmp_path, 2, dataset={"revision": "v2"})
    assert stream.taken == [0, 1, 0, 1]


def test_a_local_stream_follows_its_files(folder: Folder, tmp_path: Path) -> None:
    from packed import table

    path = tmp_path / "a.parquet"
    pictures = folder(3)
    table(pictures).to_parquet(str(path))
    dataset = {"path": str(path), "streaming": True, "limit": 2}
    assert captions_of(looked(tmp_path / "cache", dataset=dataset))[0] == "a photo of zib number 0"
    shutil.copyfile(pictures / "2.txt", pictures / "0.txt")
    table(pictures).to_parquet(str(path))
    assert captions_of(looked(tmp_path / "cache", dataset=dataset))[0] == "a photo of zib number 2"
