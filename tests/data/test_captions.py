"""Captions are found where the recipe says, and a draw's is a pure function of seed, picture and draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.checks import contradictions
from finetune.config.schema import ConceptConfig, DataConfig, Recipe
from finetune.data import Concept, captions, scan
from finetune.errors import UserError


def test_the_same_draw_has_the_same_caption_and_others_differ() -> None:
    texts = tuple("abcdefgh")
    first = [captions.draw(texts, 0, "0/a.png", number) for number in range(200)]
    assert first == [captions.draw(texts, 0, "0/a.png", number) for number in range(200)]
    assert first != [captions.draw(texts, 1, "0/a.png", number) for number in range(200)]
    assert first != [captions.draw(texts, 0, "0/b.png", number) for number in range(200)]
    assert set(first) == set(texts)


def test_dropout_drops_its_share() -> None:
    draws, rate = 4000, 0.3
    dropped = sum(captions.draw(("a",), 0, "0/a.png", number, rate) == "" for number in range(draws))
    assert abs(dropped - rate * draws) < 3 * math.sqrt(draws * rate * (1 - rate))


def test_no_dropout_drops_nothing() -> None:
    assert all(captions.draw(("a",), 0, "0/a.png", number) == "a" for number in range(1000))


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("01_zib_star.png", "zib star"),
        ("00012-3 a red-blue star.jpg", "a red-blue star"),
        ("-7 dog.webp", "dog"),
        ("zib star 2.png", "zib star 2"),
        ("a.b.png", "a.b"),
        ("0001.png", None),
        ("2024-05-01__.png", None),
    ],
)
def test_a_picture_s_name_is_its_caption(name: str, caption: str | None) -> None:
    assert captions.from_name(Path("photos") / name) == ((caption,) if caption else ())


def test_csv_holds_what_jsonl_holds(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes('\ufefffile_name,source,text\r\na.png,x,"one, ""two""\nthree"\r\n\r\nsub/b.png,,four\r\n'.encode())
    rows, problems = captions.read_metadata(path)
    assert not problems
    assert rows["a.png"].captions == ('one, "two" three',)
    assert rows["sub/b.png"].captions == ("four",)
    other = tmp_path / "metadata.jsonl"
    other.write_text('{"file_name": "a.png", "text": ["one", "two"]}\n')
    assert captions.metadata_file(tmp_path) == other


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "metadata.csv:1: the line that names the columns: has no 'file_name'"),
        (b"file_name;text\na.png;b\n", "metadata.csv:1: the line that names the columns: has no 'file_name'"),
        (b"filename,text\na.png,b\n", "did you mean 'filename'?"),
        (b"file_name,text\na.png,b\nb.png,c,d\n", "metadata.csv:3: has 3 columns, the first line 2"),
        (b"file_name,text\na.png,b\na.png,c\n", "metadata.csv:3: a.png has a caption on line 2 already"),
        (b'file_name,text\na.png,"b\nc"\n../x.png,d\n', "metadata.csv:4: file_name must be a path inside"),
        (b'file_name,text\na.png,"b\n', "metadata.csv:2: is not CSV"),
        (b"file_name,text\na.png,\xff\n", "metadata.csv: is not UTF-8: byte 0xff at offset 21"),
    ],
)
def test_bad_csv_says_where_and_what(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes(content)
    problems = captions.read_metadata(path)[1]
    assert len(problems) == 1
    assert said in problems[0]


def concept_of(folder: Path, **keys: object) -> Concept:
    return scan(DataConfig.model_validate({"concepts": [{"folder": str(folder), **keys}]}))[0]


def test_names_and_folders_are_captions_where_the_recipe_says_so(folder: Callable[..., Path]) -> None:
    path = folder(2, "10_zib  star")
    (path / "0.png").rename(path / "0 a_dog.png")
    found = concept_of(path, captions="filename", prompt="p")
    assert [picture.captions for picture in found.pictures] == [("a dog",), ("p",)]
    assert found.config.repeats == 1
    with pytest.raises(UserError, match=r"1.png: has no caption: give it a name with words"):
        concept_of(path, captions="filename")
    found = concept_of(path, captions="folder")
    assert [picture.captions for picture in found.pictures] == [("zib star",)] * 2
    assert found.config.repeats == 10
    assert concept_of(path, captions="folder", repeats=2).config.repeats == 2
    # auto guesses neither
    assert [p.captions for p in concept_of(path, prompt="p").pictures] == [("p",), ("a photo of zib number 1",)]


def test_a_lock_keeps_the_folder_s_repeats() -> None:
    first = ConceptConfig.model_validate({"folder": "x/3_a dog/", "captions": "folder"})
    assert first.repeats == 3
    assert ConceptConfig.model_validate(first.model_dump(mode="json")) == first


@pytest.mark.parametrize("name", ["dog", "0_dog", "_dog", "10_", "10 dog", "x_10_dog"])
def test_a_folder_that_is_not_called_so_is_refused(name: str, folder: Callable[..., Path]) -> None:
    path = folder(1, name)
    with pytest.raises(UserError, match=r"captions: is 'folder', but .* is not called like '10_zib star'"):
        concept_of(path, captions="folder")
    keys = {"recipe": "lora", "output": "run", "adapter": {"kind": "lora"}}
    recipe = Recipe.model_validate({**keys, "data": {"concepts": [{"folder": str(path), "captions": "folder"}]}})
    assert [one.path for one in contradictions(recipe)] == [("data", "concepts", 0, "captions")]


def test_csv_is_read_where_there_is_no_jsonl(folder: Callable[..., Path]) -> None:
    path = folder(2)
    (path / "metadata.csv").write_text("file_name,text\n0.png,from csv\n9.png,nothing\n")
    with pytest.raises(UserError, match=r"metadata.csv:3: there is no 9.png"):
        concept_of(path)
    (path / "metadata.csv").write_text("file_name,text\n0.png,from csv\n")
    assert concept_of(path).pictures[0].captions == ("from csv",)
    (path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "from jsonl"}\n')
    found = concept_of(path)
    assert found.pictures[0].captions == ("from jsonl",)
    assert "1 entry ignored: metadata.csv" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("join", ("zib star on grass",)),
        ("choose", ("zib star", "on grass")),
        ("first", ("zib star",)),
    ],
)
def test_lines_of_a_text_file(lines: str, expected: tuple[str, ...], folder: Callable[..., Path]) -> None:
    path = folder(1)
    (path / "0.txt").write_bytes(b"\xef\xbb\xbf\r\n  zib   star\r\n\r\non grass \n")
    assert concept_of(path, caption_lines=lines).pictures[0].captions == expected
    (path / "0.txt").write_text("\n\n")
    assert concept_of(path, caption_lines=lines, prompt="p").pictures[0].captions == ("p",)


def test_captions_that_fall_back_to_the_prompt_are_counted(folder: Callable[..., Path]) -> None:
    path = folder(3)
    assert not concept_of(path, prompt="p").notes
    (path / "1.txt").unlink()
    (note,) = concept_of(path, prompt="p").notes
    assert note.endswith("1 picture has no caption of its own and takes the prompt: 1.png")
    for number in (0, 2):
        (path / f"{number}.txt").unlink()
    assert not concept_of(path, prompt="p").notes  # the prompt is for all of them
    assert not concept_of(path, prompt="p", captions="prompt").notes
    (note,) = concept_of(path, prompt="p", captions="sidecar").notes
    assert note.endswith("3 pictures have no caption of their own and take the prompt: 0.png, 1.png, 2.png")
