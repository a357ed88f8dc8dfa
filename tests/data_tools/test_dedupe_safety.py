"""Moving copies loses no caption and breaks no link, and only what is like the picture that stays is moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import dedupe
from data_tools.likeness import alike, copies, look
from finetune.data import decoding
from finetune.data.captions import read_metadata


def photo(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture."""
    path = tmp_path / "photos"
    path.mkdir()
    photo(0).save(path / "a.png")
    return path


def copy(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(folder / "a.png", folder / name)


def caption(folder: Path, names: Sequence[str]) -> None:
    lines = [json.dumps({"file_name": name, "text": f"caption of {name}\u2028b"}, ensure_ascii=False) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")  # no line feed at the end


def named(folder: Path) -> set[str]:
    rows, wrong = read_metadata(folder / "metadata.jsonl")
    assert not wrong
    return set(rows)


def move(folder: Path, away: Path) -> None:
    dedupe.move(dedupe.find(folder)[0], folder, away)


def test_a_second_move_adds_to_the_captions_of_the_first(folder: Path, tmp_path: Path) -> None:
    copy(folder, "a2.png")
    caption(folder, ["a.png", "./a2.png"])
    move(folder, tmp_path / "away")
    copy(folder, "a3.png")
    caption(folder, ["a.png", "a3.png"])
    move(folder, tmp_path / "away")
    assert named(folder) == {"a.png"} and named(tmp_path / "away") == {"a2.png", "a3.png"}


def test_two_copies_that_share_a_text_file_take_it_along(folder: Path, tmp_path: Path) -> None:
    photo(0, (180, 120)).save(folder / "large.png")
    shutil.copy(folder / "a.png", folder / "a.webp")
    (folder / "a.txt").write_text("of both", encoding="utf-8")
    move(folder, tmp_path / "away")
    assert {path.name for path in (tmp_path / "away").iterdir()} == {"a.png", "a.webp", "a.txt"}
    assert {path.name for path in folder.iterdir()} == {"large.png"}


def test_a_link_is_no_copy_of_what_it_points_at(folder: Path, tmp_path: Path) -> None:
    (folder / "0.png").symlink_to("a.png")
    move(folder, tmp_path / "away")
    assert (folder / "0.png").read_bytes() == (folder / "a.png").read_bytes()


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_moving_again_completes_what_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    copy(folder, "a2.png", "a3.png")
    caption(folder, ["a.png", "a2.png", "a3.png"])
    for name in ("a2", "a3"):
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    real, calls = dedupe._rename, [0]

    def failing(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        real(source, target)

    away = tmp_path / "away"
    monkeypatch.setattr(dedupe, "_rename", failing)
    with pytest.raises(KeyboardInterrupt):
        move(folder, away)
    assert all((folder / name).is_file() for name in named(folder)), "a run would be refused"
    monkeypatch.setattr(dedupe, "_rename", real)
    move(folder, away)
    assert named(folder) == {"a.png"} and named(away) == {"a2.png", "a3.png"}
    assert {path.name for path in folder.iterdir()} == {"a.png", "metadata.jsonl"}
    assert {path.name for path in away.iterdir()} == {"a2.png", "a2.txt", "a3.png", "a3.txt", "metadata.jsonl"}


def test_of_a_slow_film_only_frames_like_the_one_that_stays_are_copies(tmp_path: Path) -> None:
    first, last = (np.asarray(photo(seed), dtype=np.float64) for seed in (1, 2))
    for number in range(31):
        frame = first + (last - first) * number / 60
        Image.fromarray(frame.astype(np.uint8)).save(tmp_path / f"{number:02}.png")
    files = sorted(tmp_path.iterdir())
    looks = {path: look(Image.open(path)) for path in files}
    chains = copies([looks[path].hash for path in files], lambda a, b: alike(looks[files[a]], looks[files[b]]))
    unlike = [
        (chain, other) for chain in chains for other in chain if not alike(looks[files[chain[0]]], looks[files[other]])
    ]
    assert unlike, "the film is not slow enough to try this"
    groups, _ = dedupe.find(tmp_path)
    assert groups
    assert all(alike(looks[group.best], looks[other]) for group in groups for other in group.others)


def test_every_picture_is_decoded_once_though_all_share_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        Image.new("L", (16, 16), 6 * number).save(tmp_path / f"{number}.png")
    decoded: list[Path] = []
    real = decoding.decode

    def counting(content: bytes, path: Path) -> Image.Image:
        decoded.append(path)
        return real(content, path)

    monkeypatch.setattr(decoding, "decode", counting)
    dedupe.find(tmp_path)
    assert len(decoded) == 40
