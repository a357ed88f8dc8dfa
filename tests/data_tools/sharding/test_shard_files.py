"""Shards are a pure function of the pictures, whole or absent, never of two states of a folder, and read by others."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image
from typer.testing import CliRunner

from data_tools.sharding import Settings, folder, parse_size, shard
from data_tools.sharding.listing import Listing
from finetune.cli import app
from finetune.errors import UserError

TWO = Settings(count=2)
Format = Any


def photo(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures: three with a text beside them, two in a folder below with metadata, one without a caption."""
    path = tmp_path / "photos"
    (path / "more").mkdir(parents=True)
    for number in range(4):
        photo(number).save(path / f"{number}.png")
    for number in range(3):
        (path / f"{number}.txt").write_text(f"a zib\nnumber {number}", encoding="utf-8")
    for name in ("a.b.png", "c.jpg"):
        photo(7).save(path / "more" / name)
    lines = [{"file_name": "a.b.png", "text": ["ä star", "a sun"]}, {"file_name": "c.jpg", "text": "a moon"}]
    (path / "more" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """By key, as WebDataset has it: a name up to its first dot."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def test_every_picture_is_there_with_all_of_its_captions(photos: Path, tmp_path: Path) -> None:
    done = shard(photos, tmp_path / "out", TWO)
    assert [record.pictures for record in done.records] == [2, 2, 2]
    found = samples(tmp_path / "out")
    assert list(found) == [f"{number:09}" for number in range(6)]
    names = [json.loads(one["json"])["file_name"] for one in found.values()]
    assert names == ["0.png", "1.png", "2.png", "3.png", "more/a.b.png", "more/c.jpg"]
    for one, name in zip(found.values(), names, strict=True):
        assert set(one) == {"png", "json", "txt"}  # of one name each, whatever the file is: datasets needs it
        assert one["png"] == (photos / name).read_bytes()
        assert json.loads(one["json"])["sha256"] == hashlib.sha256(one["png"]).hexdigest()
    texts = [one["txt"].decode() for one in found.values()]
    assert texts == ["a zib number 0", "a zib number 1", "a zib number 2", "", "ä star", "a moon"]
    assert json.loads(found["000000004"]["json"])["text"] == ["ä star", "a sun"]
    assert sum(record.without_caption for record in done.records) == 1


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_the_same_pictures_give_the_same_bytes(format: Format, photos: Path, tmp_path: Path) -> None:
    settings = Settings(format=format, count=2)
    shard(photos, tmp_path / "one", settings, workers=1)
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved, copy_function=shutil.copyfile)  # other times
    for path in moved.rglob("*.png"):
        path.chmod(0o600)
    shard(moved, tmp_path / "two", settings, workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    index = json.loads((tmp_path / "one" / "index.json").read_text())
    for one in index["shards"]:
        assert hashlib.sha256((tmp_path / "one" / one["name"]).read_bytes()).hexdigest() == one["sha256"]
    assert (index["pictures"], len(index["shards"])) == (6, 3)


def test_datasets_reads_tars(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(photos, out, TWO)
    files = [str(path) for path in sorted(out.glob("*.tar"))]
    rows = load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["png"], ImageFeature)
    assert [row["txt"] for row in rows][-2:] == ["ä star", "a moon"]
    assert np.array_equal(np.asarray(rows[1]["png"]), np.asarray(photo(1)))
    assert rows[5]["png"].size == (20, 16)  # the JPEG


def test_datasets_reads_tables_of_pictures(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(photos, out, Settings(format="parquet", count=4, masks=masked(photos, tmp_path)))
    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["image"], ImageFeature) and isinstance(rows.features["mask"], ImageFeature)
    assert np.array_equal(np.asarray(rows[1]["image"]), np.asarray(photo(1)))
    assert np.asarray(rows[1]["mask"]).max() == 255
    assert rows["text"][:] == ["a zib number 0", "a zib number 1", "a zib number 2", "", "ä star", "a moon"]
    assert rows["captions"][4] == ["ä star", "a sun"]


def masked(photos: Path, tmp_path: Path) -> Path:
    masks = tmp_path / "masks"
    for path in [*photos.rglob("*.png"), *photos.rglob("*.jpg")]:
        mask = (masks / path.relative_to(photos)).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16), 255).save(mask)
    return masks


def test_masks_go_along_and_must_fit(photos: Path, tmp_path: Path) -> None:
    masks = masked(photos, tmp_path)
    shard(photos, tmp_path / "out", Settings(masks=masks))
    assert all(one["mask.png"].startswith(b"\x89PNG") for one in samples(tmp_path / "out").values())
    Image.new("L", (20, 17), 255).save(masks / "1.png")
    Image.new("L", (20, 16)).save(masks / "2.png")
    (masks / "more" / "c.png").unlink()
    with pytest.raises(UserError) as caught:
        shard(photos, tmp_path / "other", Settings(masks=masks))
    for told in ("1.png (its mask): is 20 x 17", "2.png (its mask): its mask is empty", "more/c.jpg: has no mask"):
        assert told in str(caught.value)


def test_a_mask_folder_and_the_shards_within_are_no_pictures(photos: Path, tmp_path: Path) -> None:
    inside = shutil.move(masked(photos, tmp_path), photos / "masks")
    out = photos / "out"
    for _ in range(2):
        done = shard(photos, out, Settings(masks=Path(inside)))
        assert done.records[0].pictures == 6


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_one_goes_on(stop: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(photos, tmp_path / "whole", TWO)
    whole = contents(tmp_path / "whole")
    from data_tools.sharding import making

    real, calls = making.read, [0]

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] >= 2 * stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(making, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        shard(photos, tmp_path / "out", TWO, workers=1)
    monkeypatch.setattr(making, "read", real)
    left = contents(tmp_path / "out")
    assert not any("partial" in name for name in left) and "index.json" not in left
    assert {name for name in left if name.endswith(".tar")} == {f"{number:05}.tar" for number in range(stop - 1)}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    done = shard(photos, tmp_path / "out", TWO)
    assert done.written == 3 - (stop - 1)
    assert contents(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_again_writes_nothing_and_a_damaged_shard_is_made_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(photos, out, TWO)
    whole, times = contents(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert shard(photos, out, TWO).written == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (out / "00001.tar").write_bytes(whole["00001.tar"][:1000])
    (out / "00002.tar").unlink()
    assert shard(photos, out, TWO).written == 2
    assert contents(out) == whole


CHANGES: dict[str, Callable[[Path], object]] = {
    "a picture": lambda photos: photo(9).save(photos / "2.png"),
    "a caption": lambda photos: (photos / "2.txt").write_text("another"),
    "one more before": lambda photos: photo(9).save(photos / "00.png"),
    "one more at the end": lambda photos: photo(9).save(photos / "more" / "z.png"),
    "one less": lambda photos: [(photos / "more" / name).unlink() for name in ("c.jpg", "metadata.jsonl")],
    "two less": lambda photos: shutil.rmtree(photos / "more"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_states_of_a_folder_are_never_mixed(change: str, photos: Path, tmp_path: Path) -> None:
    settings, out = Settings(count=4), tmp_path / "out"
    shard(photos, out, settings)
    before = contents(out)
    CHANGES[change](photos)
    with pytest.raises(UserError, match=r"photos has changed since .*out was begun"):
        shard(photos, out, settings)
    assert contents(out)["index.json"] == before["index.json"]


def test_full_shards_stay_when_a_folder_grows_at_its_end(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out", Settings(count=3))
    photo(9).save(photos / "more" / "z.png")
    assert shard(photos, tmp_path / "out", Settings(count=3)).written == 1
    shard(photos, tmp_path / "new", Settings(count=3))
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_other_settings_need_another_folder(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out", TWO)
    with pytest.raises(UserError, match="begun with count 2, not 3"):
        shard(photos, tmp_path / "out", Settings(count=3))
    with pytest.raises(UserError, match="begun with format 'webdataset', not 'parquet'"):
        shard(photos, tmp_path / "out", Settings(format="parquet", count=2))


def test_what_is_broken_is_named_and_mending_it_completes_the_rest(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "whole", Settings(count=1))
    right = {name: (photos / name).read_bytes() for name in ("2.png", "more/c.jpg")}
    for name, content in right.items():
        (photos / name).write_bytes(content[:100])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="2 things are wrong") as caught:
        shard(photos, out, Settings(count=1), workers=4)
    assert "2.png: is " in str(caught.value) and "c.jpg: is " in str(caught.value)
    assert {path.name for path in out.glob("*.tar")} == {"00000.tar", "00001.tar"}  # mending may move what is behind
    for name, content in right.items():
        (photos / name).write_bytes(content)
    assert shard(photos, out, Settings(count=1)).written == 4
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_broken_can_be_left_out_and_is_named_each_time(photos: Path, tmp_path: Path) -> None:
    (photos / "1.png").write_text("no picture")
    for _ in range(2):
        done = shard(photos, tmp_path / "out", Settings(count=2, leave_out=True))
        assert [record.left_out for record in done.records] == [["1.png"], [], []]
        assert len(done.problems) == 1 and "1.png: is " in done.problems[0]
    assert list(samples(tmp_path / "out")) == [f"{number:09}" for number in (0, 2, 3, 4, 5)]


def test_metadata_must_name_what_is_there(photos: Path, tmp_path: Path) -> None:
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "more/c.jpg", "text": "far"}\n{"file_name": "x", "text": ""}\nno'
    )
    with pytest.raises(UserError) as caught:
        shard(photos, tmp_path / "out", TWO)
    assert "metadata.jsonl:2: there is no x in the folder" in str(caught.value) and ":3: is not JSON" in str(
        caught.value
    )
    listed = {one.name: one.captions for one in Listing(photos)}
    assert listed["more/c.jpg"] == ("a moon",)  # the nearest has the word


def test_sizes_split_by_bytes(photos: Path, tmp_path: Path) -> None:
    one = (photos / "0.png").stat().st_size
    done = shard(photos, tmp_path / "out", Settings(size=2 * one + 10))
    assert [record.pictures for record in done.records[:2]] == [2, 2]
    assert [record.pictures for record in shard(photos, tmp_path / "tiny", Settings(size=1)).records] == [1] * 6
    assert [parse_size(text) for text in ("256MB", "1.5 GiB", "7", "3kb")] == [256_000_000, 1_610_612_736, 7, 3000]
    with pytest.raises(UserError, match="'5 apples' is no size"):
        parse_size("5 apples")


def test_the_command_says_what_it_did(photos: Path, tmp_path: Path) -> None:
    command = ["data", "shard", str(photos), "--out", str(tmp_path / "out"), "--count", "4"]
    for told in ("2 written, 0 were there", "0 written, 2 were there"):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0 and "6 pictures in 2 shards" in found.output and told in found.output
        assert "1 pictures have no caption" in found.output
    for bad, told in ((tmp_path / "none", "no such folder"), (tmp_path / "out", "holds no pictures")):
        found = CliRunner().invoke(app, ["data", "shard", str(bad), "--out", str(tmp_path / "new")])
        assert found.exit_code != 0 and told in str(found.exception)


def test_shards_do_not_wait_for_the_end_of_the_listing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are read no further than the workers are, so that a million of them take no memory."""
    far: list[int] = []
    real = folder._split

    def watched(*arguments: Any) -> Any:
        for number, pictures in enumerate(real(*arguments)):
            far.append(number)
            yield pictures

    monkeypatch.setattr(folder, "_split", watched)
    reached: list[int] = []
    take = folder._take

    def taking(*arguments: Any) -> None:
        reached.append(max(far))
        take(*arguments)

    monkeypatch.setattr(folder, "_take", taking)
    shard(photos, tmp_path / "out", Settings(count=1), workers=1)
    assert reached == [2, 3, 4, 5, 5, 5]
