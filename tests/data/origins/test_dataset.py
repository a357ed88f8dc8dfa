"""Rows of tables are pictures with the bytes of their files, and what is wrong with one is named with its row."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed import captions_of, looked, records, table
from PIL import Image

from finetune.config.schema import ConceptConfig
from finetune.data import decoding

Folder = Callable[..., Path]


def written(path: Path, rows: list[dict[str, Any]], **columns: Any) -> Path:
    pq.write_table(pa.Table.from_pylist([{**row, **columns} for row in rows]), path)
    return path


def test_the_bytes_are_those_of_the_file(folder: Folder, tmp_path: Path) -> None:
    """Turned by its EXIF data, which a decoded picture would have lost."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "text": "a"}]
    path = written(tmp_path / "a.parquet", rows)
    (picture,) = looked(tmp_path / "cache", dataset={"path": str(path)}).concepts[0].pictures
    assert picture.path.read_bytes() == buffer.getvalue()
    assert (picture.facts.width, picture.facts.height) == (20, 40)


def test_columns_of_plain_bytes_lists_of_captions_and_masks(folder: Folder, tmp_path: Path) -> None:
    white = io.BytesIO()
    Image.new("L", (24, 24), 255).save(white, "PNG")
    rows = [
        {"png": row["image"]["bytes"], "said": [row["text"], "or so"], "m": white.getvalue()}
        for row in records(folder(2))
    ]
    path = written(tmp_path / "a.parquet", rows)
    dataset = {"path": str(path), "image": "png", "text": "said", "mask": "m"}
    found = looked(tmp_path / "cache", dataset=dataset)
    assert found.problems == []
    assert [picture.captions for picture in found.concepts[0].pictures] == [
        ("a photo of zib number 0", "or so"),
        ("a photo of zib number 1", "or so"),
    ]
    (mask, _) = [picture.mask for picture in found.concepts[0].pictures]
    assert mask is not None and not isinstance(mask, str) and mask.read_bytes() == white.getvalue()


def test_limit_skip_and_prompts_for_rows_without_a_caption(folder: Folder, tmp_path: Path) -> None:
    rows = records(folder(5))
    rows[1]["text"] = None
    rows[3]["text"] = ""
    path = written(tmp_path / "a.parquet", rows)
    found = looked(tmp_path / "cache", dataset={"path": str(path), "limit": 4, "skip": [2]}, prompt="p")
    assert [picture.id for picture in found.concepts[0].pictures] == ["0/0", "0/1", "0/3"]
    assert captions_of(found) == ["a photo of zib number 0", "p", "p"]
    without = looked(tmp_path / "cache", dataset={"path": str(path)})
    assert without.problems == [
        f"{path}: row 1: has no caption: fill its column 'text', or set prompt for those without",
        f"{path}: row 3: has no caption: fill its column 'text', or set prompt for those without",
    ]


def test_what_is_wrong_is_named_with_file_and_row(folder: Folder, tmp_path: Path) -> None:
    rows = records(folder(6))
    rows[1]["image"] = None
    rows[3]["image"] = {"bytes": b"this is no picture", "path": None}
    rows[4]["image"] = {"bytes": rows[4]["image"]["bytes"][:50], "path": None}
    rows[5]["image"] = {"bytes": None, "path": "https://example.com/x.png"}
    one, two = written(tmp_path / "1.parquet", rows[:2]), written(tmp_path / "2.parquet", rows[2:])
    found = looked(tmp_path / "cache", dataset={"path": str(tmp_path / "?.parquet")})
    assert [picture.id for picture in found.concepts[0].pictures] == ["0/0", "0/2"]
    assert [problem.partition(" (")[0] for problem in found.problems] == [
        f"{one}: row 1: the column 'image' has no picture: expected the bytes of a file, found nothing",
        f"{two}: row 1: is not a picture; it begins with b'this is no pictu'",
        f"{two}: row 2: is broken or cut short",
        f"{two}: row 3: the column 'image' names 'https://example.com/x.png'; pictures must lie in the table",
    ]


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"image": "imgae"}, "dataset.image: there is no column 'imgae'; did you mean 'image'?"),
        ({"text": "caption"}, "dataset.text: there is no column 'caption'; known: image, text; null where"),
        ({"image": "text"}, "dataset.image: the column 'text' holds no pictures but"),
        ({"skip": [1, 7]}, "dataset.skip: there is no row 7"),
        ({"mask": "masks"}, "dataset.mask: there is no column 'masks'"),
        ({"split": "test"}, "dataset.split: is 'test', but Parquet files that are named are all of one split"),
        ({"path": "{}/b.parquet"}, "dataset.path: {}/b.parquet does not exist"),
        ({"path": "{}/a/b/c"}, "dataset.path: {}/a/b/c does not exist; there is no 'a' in {}"),
        ({"path": "{}/saved", "revision": "main"}, "dataset.revision: is set, but {}/saved lies on this machine"),
        ({"path": "{}/broken.parquet"}, "{}/broken.parquet: is no Parquet that can be read"),
        ({"path": "{}/script"}, "{}/script: cannot be opened as a dataset"),
        ({"path": "{}/splits", "split": "test"}, "{}/splits: cannot be opened as a dataset"),
        ({"path": "{}/empty.parquet"}, "dataset: {}/empty.parquet has no rows"),
    ],
)
def test_what_a_recipe_names_wrongly(folder: Folder, tmp_path: Path, dataset: dict[str, Any], said: str) -> None:
    whole = table(folder(2))
    whole.to_parquet(str(tmp_path / "a.parquet"))
    whole.select([]).to_parquet(str(tmp_path / "empty.parquet"))
    whole.save_to_disk(str(tmp_path / "saved"))
    __import__("datasets").DatasetDict(train=whole).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('was run')")
    keys = {
        key: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in {"path": "{}/a.parquet", **dataset}.items()
    }
    (problem,) = looked(tmp_path / "cache", dataset=keys).problems
    assert said.replace("{}", str(tmp_path)) in problem


def test_a_split_of_a_saved_dictionary(folder: Folder, tmp_path: Path) -> None:
    whole = table(folder(3))
    parts = __import__("datasets").DatasetDict(train=whole.select([0, 1]), test=whole.select([2]))
    parts.save_to_disk(str(tmp_path / "saved"))
    found = looked(tmp_path / "cache", dataset={"path": str(tmp_path / "saved"), "split": "test"})
    assert captions_of(found) == ["a photo of zib number 2"]


def test_no_code_of_a_data_set_is_ever_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the hub only the call is looked at; nothing is downloaded in tests."""
    asked: list[dict[str, Any]] = []

    def load(path: str, name: str | None = None, **keys: Any) -> None:
        asked.append({"path": path, "name": name, **keys})
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    dataset = {"path": "someone/dogs", "name": "small", "split": "validation", "revision": "v1"}
    (problem,) = looked(tmp_path / "cache", dataset=dataset).problems
    assert problem == "someone/dogs: cannot be opened as a dataset: ConnectionError: no network"
    assert asked == [
        {"path": "someone/dogs", "name": "small", "split": "validation", "revision": "v1", "streaming": False}
    ]


def test_metadata_may_be_parquet(folder: Folder, tmp_path: Path) -> None:
    path = folder(3, captions=False)
    named = [
        {"file_name": "0.png", "text": ["one", "two"]},
        {"file_name": "1.png", "text": ["three"]},
        {"file_name": "2.png", "text": None},
        {"file_name": "../3.png", "text": ["x"]},
        {"file_name": "4.png", "text": ["x"]},
    ]
    pq.write_table(pa.Table.from_pylist(named), path / "metadata.parquet")
    found = looked(tmp_path / "cache", folder=str(path), prompt="p")
    assert [picture.captions for picture in found.concepts[0].pictures] == [("one", "two"), ("three",), ("p",)]
    assert [problem.partition(",")[0] for problem in found.problems] == [
        f"{path}/metadata.parquet:3: text must be a caption or a list of captions",
        f"{path}/metadata.parquet:4: file_name must be a path inside the folder",
        f"{path}/metadata.parquet:5: there is no 4.png in the folder; did you mean '2.png'?",
    ]
    (path / "metadata.parquet").write_bytes(b"PAR1")
    assert "is no Parquet that can be read" in looked(tmp_path / "cache", folder=str(path), prompt="p").problems[0]
    pq.write_table(pa.Table.from_pylist([{"file": "0.png", "text": "x"}]), path / "metadata.parquet")
    assert "has no 'file_name'" in looked(tmp_path / "cache", folder=str(path), prompt="p").problems[0]


def test_indexes_hold_no_pictures(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is asked for its captions alone until a picture is decoded."""
    from finetune.data.origins import find

    path = written(tmp_path / "a.parquet", records(folder(3)))
    monkeypatch.setattr(decoding, "read", lambda _: pytest.fail("a picture was read"))
    config = ConceptConfig.model_validate({"dataset": {"path": str(path)}})
    finds = find(config, "data.concepts[0]", tmp_path / "cache")
    assert [str(sample.picture) for sample in finds.samples] == [f"{path}: row {number}" for number in range(3)]
