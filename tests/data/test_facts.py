"""Pictures are decoded once: what is known of their content is remembered, and never of anything else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from finetune import files
from finetune.data import decoding, facts
from finetune.data.decoding import Facts, inspect
from finetune.data.facts import Known
from finetune.data.sources import survey

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "LEAST", 1)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded, in any order."""
    names: list[str] = []
    real = decoding.facts

    def counting(content: bytes, sha256: str, path: Path) -> Facts:
        names.append(path.name)
        return real(content, sha256, path)

    monkeypatch.setattr(decoding, "facts", counting)
    return names


def look(cache: Path | None, folder: Path, workers: int = 2) -> list[Facts]:
    paths = sorted(folder.glob("*.png"))
    return [one.result() for one in Known(cache).look_at_all(paths, workers)]


def test_what_was_decoded_once_is_only_read_again(folder: Write, tmp_path: Path, decoded: list[str]) -> None:
    photos, cache = folder(4), tmp_path / "cache"
    first = look(cache, photos)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    assert first == [inspect(path) for path in sorted(photos.glob("*.png"))]
    decoded.clear()
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    assert look(cache, moved) == first
    assert decoded == []


def test_a_few_pictures_leave_no_trace(folder: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "LEAST", 5)
    look(tmp_path / "cache", folder(4))
    assert not (tmp_path / "cache").exists()


def test_a_picture_with_another_content_is_another_picture(folder: Write, tmp_path: Path, decoded: list[str]) -> None:
    photos, cache = folder(2), tmp_path / "cache"
    look(cache, photos)
    Image.new("RGB", (40, 30)).save(photos / "1.png")
    decoded.clear()
    assert (look(cache, photos)[1].width, decoded) == (40, ["1.png"])


def test_what_is_broken_is_never_remembered(folder: Write, tmp_path: Path, decoded: list[str]) -> None:
    photos = folder(2)
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:60])
    for _ in range(2):
        whole, cut = Known(tmp_path / "cache").look_at_all([photos / "0.png", photos / "1.png"])
        assert whole.exception() is None and "1.png: is broken or cut short" in str(cut.exception())
    assert sorted(decoded) == ["0.png", "1.png", "1.png"], "the first was remembered, though the scan failed"


def test_a_damaged_pack_is_as_good_as_absent(
    folder: Write, tmp_path: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    photos, cache = folder(2), tmp_path / "cache"
    first = look(cache, photos)
    (pack,) = cache.rglob("*.jsonl")
    pack.write_bytes(pack.read_bytes().replace(b"24", b"25"))
    decoded.clear()
    assert look(cache, photos) == first
    assert len(decoded) == 2 and "is damaged" in caplog.text


def test_another_decoder_looks_again(
    folder: Write, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = folder(2)
    look(tmp_path, photos)
    monkeypatch.setattr(facts.PIL, "__version__", "99")
    look(tmp_path, photos)
    assert len(decoded) == 4


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    folder: Write, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = folder(2)
    (tmp_path / "file").write_text("no folder")

    def refused(path: Path, text: str) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(files, "write_text", refused)
    for cache in (None, tmp_path / "cache", tmp_path / "file"):
        assert [one.width for one in look(cache, photos)] == [24, 24]
    assert len(decoded) == 6 and not (tmp_path / "cache").exists()


def test_long_scans_write_on_the_way_and_packs_become_one(
    folder: Write, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "LINES", 1)
    monkeypatch.setattr(facts, "PACKS", 1)
    photos, cache = folder(6), tmp_path / "cache"
    paths = sorted(photos.glob("*.png"))
    some = Known(cache).look_at_all(paths, 1)
    for _ in range(2):
        next(some).result()
    assert list(cache.rglob("*.jsonl")), "an interruption would lose all"
    some.close()  # type: ignore[attr-defined]
    look(cache, photos)
    assert len(list(cache.rglob("*.jsonl"))) == 1
    decoded.clear()
    look(cache, photos)
    assert decoded == []


def test_several_scans_at_once_agree(folder: Write, tmp_path: Path) -> None:
    photos, cache, found = folder(8), tmp_path / "cache", list[Sequence[Facts]]()
    threads = [Thread(target=lambda: found.append(look(cache, photos))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one == found[0] for one in found)
    assert len(list(cache.rglob("*.jsonl"))) <= 4 and not list(cache.rglob(f"{files.PARTIAL}*"))


def test_pictures_and_problems_keep_their_order_whatever_the_workers(
    folder: Write, make_recipe: Callable[..., object]
) -> None:
    photos = folder(9)
    for bad in (2, 7):
        (photos / f"{bad}.png").write_text("no picture")
    data = make_recipe(photos).data  # type: ignore[attr-defined]
    one, four = (survey(data, workers=workers, known=Known(None)) for workers in (1, 4))
    assert one == four
    assert [problem.split(": ")[0][-5:] for problem in one.problems] == ["2.png", "7.png"]
    assert [picture.id for picture in one.concepts[0].pictures] == [f"0/{n}.png" for n in (0, 1, 3, 4, 5, 6, 8)]
