"""The run: what is captioned, what is left alone, what is named, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_captioners import photographs
from typer.testing import CliRunner, Result

from data_tools.captioning import describing, run, writing
from data_tools.captioning.captioner import Caption
from data_tools.captioning.describing import Means
from data_tools.captioning.pictures import GREY, View, ahead, masked, pictures
from data_tools.captioning.todo import Todo, Where
from data_tools.captioning.words import Wording
from finetune.cli import app
from finetune.data.captions import read_metadata
from finetune.errors import Stopped, UserError

Make = Callable[[str], Path]


class Colours:
    """Says the red of each picture's middle; nothing of black ones, and refuses red 200 as processors do."""

    samples = True

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.after: Callable[[], None] = lambda: None

    def captions(self, images: Sequence[Image.Image], generators: Sequence[Any] = ()) -> list[Caption]:
        reds = [image.getpixel((image.width // 2, image.height // 2))[0] for image in images]  # type: ignore[index]
        if 200 in reds:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        self.batches.append(len(images))
        self.after()
        return [Caption(f"a dog of red {red}" if red else "", full=red == 40) for red in reds]


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> Colours:
    colours = Colours()
    monkeypatch.setattr(describing, "_load", lambda *_: (colours, None, None))
    return colours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0 to 5, of which 2 has a caption; picture n has the red 10 (n + 1)."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 20), (10 * (number + 1), 9, 9)).save(path / f"{number}.png")
    (path / "2.txt").write_text("by hand\n", encoding="utf-8")
    return path


def caption(folder: Path, *, batch_size: int = 2, wording: Wording | None = None, **where: Any) -> run.Outcome:
    return run.caption(Where(folder, **where), Means("any"), wording or Wording(), View(), batch_size, device="cpu")


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8").strip() for path in sorted(folder.rglob("*.txt"))}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def command(folder: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", "caption", str(folder), "--device", "cpu", *map(str, arguments)])


def test_pictures_without_a_caption_get_one(folder: Path, captioner: Colours) -> None:
    done = caption(folder)
    assert (done.written, done.had, done.full, done.refused) == (5, 1, 1, ())
    others = {f"{n}.txt": f"a dog of red {10 * (n + 1)}" for n in (0, 1, 3, 4, 5)}
    assert texts(folder) == {**others, "2.txt": "by hand"}
    assert captioner.batches == [2, 2, 1]
    assert (caption(folder).written, len(captioner.batches)) == (0, 3)


def test_lines_are_added_and_the_others_stay(folder: Path, captioner: Colours) -> None:
    before = [
        {"file_name": "0.png", "text": "by hand", "rating": 5},
        {"file_name": "1.png", "text": "", "rating": 4},
        {"file_name": "gone.png", "text": ["one", "two"]},
    ]
    content = "".join(json.dumps(line) + "\n\n" for line in before)
    (folder / "metadata.jsonl").write_text(content, encoding="utf-8")
    done = caption(folder, form="jsonl")
    assert (done.written, done.had) == (4, 2), "0 has a line and 2 a text file"
    found = lines(folder)
    assert found[0] == before[0] and found[2] == before[2]
    assert found[1] == {**before[1], "text": "a dog of red 20"}
    assert {line["file_name"] for line in found[3:]} == {"3.png", "4.png", "5.png"}
    assert texts(folder) == {"2.txt": "by hand"}
    assert read_metadata(folder / "metadata.jsonl")[1] == []
    assert not (folder / writing.LOCK).exists()


def test_text_that_is_overwritten_is_kept(folder: Path, captioner: Colours) -> None:
    for expected in ("2.txt.bak", "2.txt.bak2"):
        old = (folder / "2.txt").read_text(encoding="utf-8")
        assert caption(folder, overwrite=True).written == 6
        assert (folder / expected).read_text(encoding="utf-8") == old
        assert texts(folder)["2.txt"] == "a dog of red 30"


def test_lines_that_are_overwritten_keep_the_old_text(folder: Path, captioner: Colours) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["one", "two"]}\n', encoding="utf-8")
    assert caption(folder, form="jsonl", overwrite=True).written == 6
    assert lines(folder)[0] == {"file_name": "0.png", "text": "a dog of red 10", "replaced": ["one", "two"]}


def test_a_line_that_another_wrote_meanwhile_stays(folder: Path, captioner: Colours) -> None:
    table = folder / "metadata.jsonl"
    captioner.after = lambda: table.write_text('{"file_name": "0.png", "text": "by hand"}\n', encoding="utf-8") and None
    assert caption(folder, form="jsonl").written == 5
    assert {line["file_name"]: line["text"] for line in lines(folder)}["0.png"] == "by hand"


def test_lines_are_merged_once_in_a_while(folder: Path) -> None:
    patient, hasty = writing.Lines(folder, False), writing.Lines(folder, False, every=0.0)
    patient.write(folder / "0.png", "a")
    assert not (folder / "metadata.jsonl").exists()
    hasty.write(folder / "1.png", "b")
    assert [line["text"] for line in lines(folder)] == ["b"]
    patient.close()
    patient.close()
    assert [line["text"] for line in lines(folder)] == ["b", "a"]


@pytest.mark.parametrize("form", ["sidecar", "jsonl"])
def test_it_goes_on_where_it_was_stopped(folder: Path, captioner: Colours, form: str) -> None:
    captioner.after = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after 2 captions; start again"):
        caption(folder, form=form)
    captioner.after = lambda: None
    done = caption(folder, form=form)
    assert (done.written, done.had) == (3, 3)


def test_an_error_in_the_middle_loses_no_line(folder: Path, captioner: Colours) -> None:
    def fail() -> None:
        if len(captioner.batches) == 2:
            raise torch.OutOfMemoryError("no memory")

    captioner.after = fail
    with pytest.raises(UserError, match="2 pictures at once are too many for the memory; lower --batch-size"):
        caption(folder, form="jsonl")
    assert [line["file_name"] for line in lines(folder)] == ["0.png", "1.png"]


def test_what_gets_none_is_named(folder: Path, captioner: Colours) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(folder / "3.png")
    Image.new("RGB", (20, 20), (200, 0, 0)).save(folder / "4.png")
    (folder / "5.txt").write_bytes(b"\xff\xfe caption")
    Image.new("RGB", (20, 20), (70, 0, 0)).save(folder / "6.jpg")
    Image.new("RGB", (20, 20), (80, 0, 0)).save(folder / "6.png")
    done = command(folder, "--model", "any", "--batch-size", 8)
    assert done.exit_code == 2
    for message in (
        "1.png: is not a picture; it begins with b'no picture'",
        "3.png: the model said '', which are no words",
        "4.png: the model cannot take it: absolute aspect ratio must be smaller than 200",
        "5.txt: is not UTF-8",
        "6.png: shares 6.txt with 6.jpg; rename one of them, or use --out jsonl",
        "2 captions written, 1 were there",
    ):
        assert message in done.output
    assert {path.name for path in folder.glob("*.txt*")} == {"0.txt", "2.txt", "5.txt", "6.txt"}
    assert (folder / "5.txt").read_bytes() == b"\xff\xfe caption"


def test_metadata_that_would_hide_captions_or_cannot_be_read(folder: Path, captioner: Colours) -> None:
    (folder / "metadata.csv").write_text("file_name,text\n0.png,by hand\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"which a metadata.jsonl beside it would hide"):
        caption(folder, form="jsonl")
    done = caption(folder, overwrite=True)
    assert done.written == 5 and "0.png: its caption is in" in done.refused[0]
    (folder / "metadata.csv").write_text("file,text\n0.png,by hand\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata that cannot be read may hold captions:\n.*no 'file_name'"):
        caption(folder)
    with pytest.raises(UserError, match="there is no 'fotos'"):
        caption(folder.parent / "fotos")


def test_folders_below_count_when_asked_but_not_the_masks(folder: Path, captioner: Colours) -> None:
    for name in ("below", "masks", ".hidden"):
        (folder / name).mkdir()
        Image.new("RGB", (20, 20), (99, 0, 0)).save(folder / name / "x.png")
    assert len(list(Todo(Where(folder)))) == 5
    done = caption(folder, form="jsonl", recursive=True, leave_out=folder / "masks")
    assert done.written == 6
    assert lines(folder)[-1] == {"file_name": "below/x.png", "text": "a dog of red 99"}
    assert caption(folder, form="jsonl", recursive=True, leave_out=folder / "masks").written == 0


def test_shares_are_all_pictures_once_whatever_was_written_meanwhile(folder: Path) -> None:
    first = list(Todo(Where(folder), 0, 2))
    for path in first:
        path.with_suffix(".txt").write_text("done", encoding="utf-8")
    second = list(Todo(Where(folder), 1, 2))
    assert [path.stem for path in first] == ["0", "4"] and [path.stem for path in second] == ["1", "3", "5"]


def test_pictures_are_loaded_a_few_ahead_and_no_more() -> None:
    taken: list[int] = []

    def numbers() -> Any:
        for number in range(1000):
            taken.append(number)
            yield number

    stream = ahead(numbers(), lambda number: number * 2, 4)
    assert [next(stream) for _ in range(3)] == [(0, 0), (1, 2), (2, 4)]
    assert len(taken) <= 6
    stream.close()  # type: ignore[attr-defined]


def test_the_words_around_a_caption(folder: Path, captioner: Colours) -> None:
    caption(folder, wording=Wording("zib", "dog", "photo: {caption}"))
    assert texts(folder)["0.txt"] == "photo: a zib dog of red 10"


def test_a_mask_shows_the_subject_alone_or_all_but_it() -> None:
    image = Image.new("RGB", (100, 60), (0, 200, 0))
    ImageDraw.Draw(image).rectangle((40, 20, 59, 39), fill=(200, 0, 0))
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((40, 20, 59, 39), fill=255)
    subject, background = masked(image, mask, "subject"), masked(image, mask, "background")
    assert subject.size == (24, 24), "its box of 20 pixels, with a tenth of that on each side"
    assert subject.getpixel((0, 0)) == GREY and subject.getpixel((12, 12)) == (200, 0, 0)
    assert background.size == image.size
    assert background.getpixel((50, 30)) == GREY and background.getpixel((0, 0)) == (0, 200, 0)


def test_masks_are_files_or_transparency_and_missing_ones_are_named(folder: Path, captioner: Colours) -> None:
    """Picture 0's middle is masked out, picture 1 has no mask, picture 3 has no transparency."""
    masks = folder.parent / "masks"
    masks.mkdir()
    mask = Image.new("L", (20, 20), 255)
    mask.paste(0, (5, 5, 15, 15))
    mask.save(masks / "0.png")
    done = command(folder, "--model", "any", "--masks", masks)
    assert texts(folder)["0.txt"] == f"a dog of red {GREY[0]}"
    assert f"1.png: has no mask in {masks}" in done.output and done.exit_code == 2
    see_through = Image.new("RGBA", (20, 20), (99, 0, 0, 0))
    see_through.paste((77, 0, 0, 255), (0, 0, 20, 4))
    see_through.save(folder / "1.png")
    done = command(folder, "--model", "any", "--masks", "alpha")
    assert texts(folder)["1.txt"] == "a dog of red 77"
    assert "3.png: has no transparency to take as its mask" in done.output


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    assert View(longest_side=64)(tmp_path / "a.png").size == (64, 21)
    assert View()(tmp_path / "a.png").size == (300, 100)
    assert [found.path.name for found in pictures(tmp_path)] == ["a.png"]


def test_a_dry_run_and_a_preview_write_nothing(folder: Path, captioner: Colours) -> None:
    dry = command(folder, "--model", "nowhere", "--dry-run")
    assert dry.exit_code == 0 and not captioner.batches
    assert dry.output.splitlines() == [
        *(str(folder / f"{number}.png") for number in (0, 1, 3, 4, 5)),
        "5 pictures would be captioned, 1 have a caption",
    ]
    shown = command(folder, "--model", "any", "--preview", "2", "--trigger", "zib")
    assert shown.exit_code == 0 and f"{folder / '1.png'}: zib, a dog of red 20" in shown.output
    assert "2 captions shown" in shown.output and sum(captioner.batches) == 2
    assert texts(folder) == {"2.txt": "by hand"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "3"], "--candidates 3: needs --clip"),
        (["--candidates", "3", "--beams", "2", "--clip", "tinyworld"], "leave --beams out"),
        (["--clip", "tinyworld"], "--clip: has nothing to do; give --candidates or --phrases"),
        (["--phrases", "WORDS"], "--phrases: needs --clip"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, tiny_model: Make, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "words.txt").write_text("a dog\n", encoding="utf-8")
    told = [str(tmp_path / "words.txt") if word == "WORDS" else word for word in arguments]
    done = command(folder, "--model", tiny_model("blip"), *told)
    assert done.exit_code and isinstance(done.exception, UserError) and message in str(done.exception)


def test_a_real_model_with_candidates_phrases_and_a_trigger(tmp_path: Path, tiny_model: Make) -> None:
    """The same words in any batches: the candidates of a picture are named by it."""
    (tmp_path / "words.txt").write_text("red\nblue\ngreen sky\n", encoding="utf-8")
    told = [
        *("--model", tiny_model("blip"), "--clip", tiny_model("clip"), "--phrases", tmp_path / "words.txt"),
        *("--candidates", 4, "--temperature", 5, "--max-new-tokens", 6, "--top", 2, "--trigger", "zib"),
    ]
    found = []
    for size in (1, 3):
        folder = tmp_path / f"in batches of {size}"
        folder.mkdir()
        for number, image in enumerate(photographs(4)):
            image.save(folder / f"{number}.png")
        done = command(folder, *told, "--batch-size", size)
        assert done.exit_code == 0, done.output
        found.append(texts(folder))
    assert found[0] == found[1] and len(found[0]) == 4
    assert all(text.startswith("zib, ") and text.count(", ") >= 3 for text in found[0].values())
    alone = command(folder, "--model", tiny_model("blip"), "--candidates", "2", "--clip", tiny_model("blip"))
    assert "does not compare words with pictures" in str(alone.exception)


@pytest.mark.base
def test_a_model_that_compares_chooses_phrases(folder: Path, tmp_path: Path) -> None:
    bare = command(folder, "--model", "tinyworld")
    assert "it needs some: --phrases FILE" in str(bare.exception)
    (tmp_path / "words.txt").write_text("a star\na heart\na cross\n", encoding="utf-8")
    done = command(folder, "--model", "tinyworld", "--phrases", tmp_path / "words.txt", "--top", 2)
    assert done.exit_code == 0, done.output
    assert texts(folder)["0.txt"].count("a ") == 2
