"""Copies are moved with all that belongs to them, and nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools import dedupe
from finetune.cli import app
from finetune.data.captions import read_metadata
from finetune.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``a`` in three sizes, ``b`` twice as it is, ``c`` once; one copy lies in a folder below."""
    path = tmp_path / "photos"
    (path / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    a, b, c = (Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((90, 60)) for _ in range(3))
    a.save(path / "a.png")
    a.resize((180, 120)).save(path / "a-large.png")
    a.resize((45, 30)).save(path / "below" / "a-small.png")
    b.save(path / "b.png")
    shutil.copy(path / "b.png", path / "b2.png")
    c.save(path / "c.png")
    (path / "a.txt").write_text("caption of a", encoding="utf-8")
    (path / "below" / "a-small.caption").write_text("caption of a-small", encoding="utf-8")
    return path


def names(group: dedupe.Group, folder: Path) -> tuple[str, list[str], bool]:
    return group.best.name, [path.relative_to(folder).as_posix() for path in group.others], group.same


@pytest.mark.parametrize("workers", [1, 2])
def test_the_largest_of_each_group_stays(folder: Path, workers: int) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    groups, problems = dedupe.find(folder, workers=workers)
    assert [names(group, folder) for group in groups] == [
        ("a-large.png", ["a.png", "below/a-small.png"], False),
        ("b.png", ["b2.png"], True),
    ]
    assert len(problems) == 1 and "broken.png" in problems[0]


def test_copies_move_with_their_captions_and_lines(folder: Path, tmp_path: Path) -> None:
    lines = [{"file_name": name, "text": name} for name in ("b2.png", "c.png", "below/a-small.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before = {path.name for path in folder.rglob("*") if path.is_file()}
    away = tmp_path / "away"
    groups, _ = dedupe.find(folder)
    moved = dedupe.move(groups, folder, away)
    assert sorted(path.relative_to(away).as_posix() for path in moved) == ["a.png", "b2.png", "below/a-small.png"]
    assert (away / "a.txt").read_text(encoding="utf-8") == "caption of a"
    assert (away / "below" / "a-small.caption").is_file()
    assert read_metadata(folder / "metadata.jsonl")[0].keys() == {"c.png"}
    assert read_metadata(away / "metadata.jsonl")[0].keys() == {"b2.png", "below/a-small.png"}
    after = {path.name for place in (folder, away) for path in place.rglob("*") if path.is_file()}
    assert after == before
    assert dedupe.find(folder) == ([], [])


def test_a_caption_that_a_namesake_needs_stays(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "b2.png", folder / "c.jpg")  # a copy of b, named like c, whose caption it shares
    (folder / "c.txt").write_text("caption of c", encoding="utf-8")
    groups, _ = dedupe.find(folder)
    dedupe.move(groups, folder, tmp_path / "away")
    assert (tmp_path / "away" / "c.jpg").is_file() and (folder / "c.txt").is_file()


def test_an_interrupted_move_leaves_every_file_in_one_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {path.name for path in folder.rglob("*") if path.is_file()}
    count = 0
    real = dedupe._rename

    def failing(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(dedupe, "_rename", failing)
    groups, _ = dedupe.find(folder)
    with pytest.raises(KeyboardInterrupt):
        dedupe.move(groups, folder, tmp_path / "away")
    found = [path.name for place in (folder, tmp_path / "away") for path in place.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(whole)


def test_another_disk_gets_a_whole_copy_before_the_original_goes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / "b2.png").read_bytes()

    def refuses(self: Path, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", refuses)
    dedupe._rename(folder / "b2.png", tmp_path / "away.png")
    assert (tmp_path / "away.png").read_bytes() == content and not (folder / "b2.png").exists()


def test_what_would_lose_something_is_refused_before_anything_moves(folder: Path, tmp_path: Path) -> None:
    groups, _ = dedupe.find(folder)
    with pytest.raises(UserError, match="choose a folder outside"):
        dedupe.move(groups, folder, folder / "away")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "a.png").write_bytes(b"another")
    with pytest.raises(UserError, match="is there already"):
        dedupe.move(groups, folder, tmp_path / "away")
    (folder / "metadata.csv").write_text("file_name,text\nc.png,c\nb2.png,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata.csv:3: names b2.png"):
        dedupe.move(groups, folder, tmp_path / "elsewhere")
    assert dedupe.find(folder)[0] == groups


def test_the_command_lists_and_moves(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["data", "dedupe", str(folder)])
    assert listed.exit_code == 0 and "3 copies of 2 pictures" in listed.output and (folder / "b2.png").exists()
    moved = runner.invoke(app, ["data", "dedupe", str(folder), "--move", str(tmp_path / "away")])
    assert "3 moved to" in moved.output and not (folder / "b2.png").exists()
    assert runner.invoke(app, ["data", "dedupe", str(tmp_path / "nowhere")]).exit_code != 0


def test_a_loop_of_links_ends(folder: Path) -> None:
    (folder / "below" / "loop").symlink_to(folder, target_is_directory=True)
    assert len(dedupe.find(folder)[0]) == 2
