"""What a folder means, and that everything wrong with it is said at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune.config.schema import ConceptConfig, DataConfig
from finetune.data import Concept, scan
from finetune.errors import UserError

Folder = Callable[..., Path]


def scan_one(path: Path, cache: Path | None = None, **keys: object) -> Concept:
    concept = ConceptConfig.model_validate({"folder": str(path), **keys})
    cached = {"folder": str(cache or path.parent / "cache")}
    return scan(DataConfig.model_validate({"concepts": [concept], "cache": cached}))[0]


def texts(concept: Concept) -> list[tuple[str, ...]]:
    return [picture.captions for picture in concept.pictures]


def rows(path: Path, *lines: object) -> None:
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def test_metadata_comes_before_text_files_and_those_before_the_prompt(folder: Folder) -> None:
    path = folder(4)
    rows(path, {"file_name": "0.png", "text": "from metadata"}, {"file_name": "1.png", "text": ["one", "two"]})
    (path / "3.txt").unlink()
    found = scan_one(path, prompt="from the prompt")
    assert texts(found) == [("from metadata",), ("one", "two"), ("a photo of zib number 2",), ("from the prompt",)]
    assert texts(scan_one(path, captions="prompt", prompt="p")) == [("p",)] * 4
    assert texts(scan_one(path, captions="sidecar", prompt="p"))[0] == ("a photo of zib number 0",)
    assert texts(scan_one(path, captions="metadata", prompt="p"))[2] == ("p",)


def test_an_empty_caption_falls_back_and_line_breaks_are_spaces(folder: Folder) -> None:
    path = folder(3)
    (path / "0.txt").write_text(" \n")
    (path / "1.txt").write_text("\ufeffa photo\n  of zib\n", encoding="utf-8")
    (path / "2.txt").rename(path / "2.caption")
    assert texts(scan_one(path, prompt="p")) == [("p",), ("a photo of zib",), ("a photo of zib number 2",)]


def test_metadata_may_name_pictures_in_folders_below(folder: Folder) -> None:
    path = folder(1)
    (path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(path / "more" / "x.png")
    rows(path, {"file_name": "more/x.png", "text": "below"})
    assert [picture.id for picture in scan_one(path).pictures] == ["0/0.png", "0/more/x.png"]


def test_ids_are_the_same_wherever_the_folder_lies(folder: Folder) -> None:
    names = [[picture.id for picture in scan_one(folder(3, name)).pictures] for name in ("here", "there")]
    assert names[0] == names[1] == ["0/0.png", "0/1.png", "0/2.png"]


def test_notes_count_what_a_person_should_know(folder: Folder) -> None:
    path = folder(3)
    (path / "notes.pdf").write_bytes(b"")
    (path / "9.txt").write_text("a caption without a picture")
    (path / "1.txt").write_text("a star")
    (path / "2.png").write_bytes((path / "0.png").read_bytes())
    notes = " | ".join(scan_one(path, trigger="zib").notes)
    assert "2 entries ignored: 9.txt, notes.pdf" in notes
    assert "1 caption lacks the trigger 'zib': 1.png" in notes
    assert "the same picture more than once: 0.png = 2.png" in notes


def not_utf8(path: Path) -> None:
    (path / "2.txt").write_bytes("caf\u00e9 of zib".encode("latin-1"))


def bad_metadata(path: Path) -> None:
    (path / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "a"}\n\n{"file_name": "1.png"\n')


def metadata_not_utf8(path: Path) -> None:
    (path / "metadata.jsonl").write_bytes(
        b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "\xff"}'
    )


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "caption not utf-8": (not_utf8, "2.txt: is not UTF-8: byte 0xe9 at offset 3"),
    "no caption": (
        lambda path: (path / "1.txt").unlink(),
        "1.png: has no caption: write 1.txt beside it, or set prompt",
    ),
    "metadata not json": (bad_metadata, "metadata.jsonl:3: is not JSON"),
    "metadata not utf-8": (metadata_not_utf8, "metadata.jsonl:2: is not UTF-8: byte 0xff at offset 68"),
    "metadata names nothing": (
        lambda path: rows(path, {"file_name": "7.png", "text": "a"}),
        "metadata.jsonl:1: there is no 7.png in the folder",
    ),
    "metadata names twice": (
        lambda path: rows(path, *[{"file_name": "0.png", "text": "a"}] * 2),
        "0.png has a caption on line 1 already",
    ),
    "metadata misspelt": (
        lambda path: rows(path, {"filename": "0.png", "text": "a"}),
        "has no 'file_name'; did you mean 'filename'?",
    ),
    "metadata leaves the folder": (
        lambda path: rows(path, {"file_name": "../0.png", "text": "a"}),
        "must be a path inside the folder",
    ),
    "metadata of another shape": (lambda path: rows(path, ["0.png", "a"]), "metadata.jsonl:1: expected"),
    "metadata text is a number": (lambda path: rows(path, {"file_name": "0.png", "text": 3}), "must be a caption"),
    "text named png": (lambda path: (path / "0.png").write_text("hello"), "0.png: is not a picture"),
    "truncated": (
        lambda path: (path / "0.png").write_bytes((path / "0.png").read_bytes()[:60]),
        "0.png: is broken or cut short",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_where_and_what(case: str, folder: Folder) -> None:
    path = folder(3)
    BAD[case][0](path)
    with pytest.raises(UserError) as caught:
        scan_one(path)
    assert BAD[case][1] in str(caught.value)
    assert str(path) in str(caught.value)


def test_everything_wrong_is_said_at_once(folder: Folder) -> None:
    first, second = folder(3, "first"), folder(3, "second")
    not_utf8(first)
    (first / "0.png").write_text("hello")
    (second / "1.txt").unlink()
    concepts = [{"folder": str(path)} for path in (first, second, first.parent / "thrid")]
    with pytest.raises(UserError) as caught:
        scan(DataConfig.model_validate({"concepts": concepts}))
    message = str(caught.value)
    assert message.startswith("4 things are wrong")
    for part in ("first/0.png", "first/2.txt", "second/1.png", "data.concepts[2].folder"):
        assert part in message


def test_a_missing_folder_names_the_nearest(folder: Folder, tmp_path: Path) -> None:
    folder(1, "star-photos")
    with pytest.raises(UserError, match=r"does not exist.*did you mean 'star-photos'"):
        scan_one(tmp_path / "star-photo")
    with pytest.raises(UserError, match="there is no 'nowhere' in"):
        scan_one(tmp_path / "nowhere" / "deep" / "photos")


def test_an_empty_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"empty holds no pictures \(.avif"):
        scan_one(tmp_path / "empty")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        scan_one(tmp_path / "file")


def test_masks_are_found_by_name_and_checked(folder: Folder, tmp_path: Path) -> None:
    path, masks = folder(2), tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (24, 24), 255).save(masks / "0.JPG")
    Image.new("L", (24, 24), 255).save(masks / "1.other.png")  # of a picture called 1.other
    with pytest.raises(UserError, match=r"1.png: has no mask in .*expected 1.png"):
        scan_one(path, masks=str(masks))
    Image.new("L", (24, 12), 255).save(masks / "1.png")
    with pytest.raises(UserError, match="is 24 x 12 pixels, but its picture is 24 x 24"):
        scan_one(path, masks=str(masks))
    Image.new("L", (24, 24), 0).save(masks / "1.png")
    with pytest.raises(UserError, match="mask is empty"):
        scan_one(path, masks=str(masks))
    Image.new("L", (24, 24), 9).save(masks / "1.png")
    assert [picture.mask for picture in scan_one(path, masks=str(masks)).pictures] == [masks / "0.JPG", masks / "1.png"]
    with pytest.raises(UserError, match=r"0.png: has no transparency"):
        scan_one(path, masks="alpha")
    with pytest.raises(UserError, match=r"masks: .*mask does not exist.*did you mean 'masks'"):
        scan_one(path, masks=str(tmp_path / "mask"))


def test_the_embedded_world_brings_pictures_prompts_and_masks(tmp_path: Path) -> None:
    concept = scan_one(Path("tinyworld:subject/3"), tmp_path, masks="tinyworld")
    assert len(concept.pictures) == 5
    assert concept.config.trigger in (concept.config.prompt or "")
    assert concept.config.trigger not in (concept.config.class_prompt or "")
    assert all(isinstance(picture.mask, Path) for picture in concept.pictures)
    assert not concept.notes
    concept.pictures[0].path.write_bytes(b"spoiled")  # an older world's file, or a broken one
    again = scan_one(Path("tinyworld:subject/3"), tmp_path, masks="tinyworld")
    assert again == concept


def test_embedded_style_is_drawn_with_its_trigger_in_every_caption(tmp_path: Path) -> None:
    concept = scan_one(Path("tinyworld:style/3"), tmp_path)
    assert len(concept.pictures) == 12
    assert concept.config.trigger is not None
    assert all(concept.config.trigger in picture.captions[0] for picture in concept.pictures)


@pytest.mark.parametrize("name", ["tinyworld:subject/x", "tinyworld:subjekt/1", "tinyworld:"])
def test_a_name_that_the_embedded_world_lacks(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tinyworld:subject/N"):
        scan_one(Path(name), tmp_path)


def test_scanning_loads_no_torch() -> None:
    code = "import sys; from finetune.data import scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
