"""Every finding on a set that has it, none on sets that are right, and the command's codes, page and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from data_tools.doctor import Diagnosis, diagnose
from finetune.cli import app
from finetune.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four different pictures of 600 x 512, each with a caption of its own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((600, 512))
        fine = Image.fromarray(rng.integers(0, 256, (512, 600, 3), dtype=np.uint8))
        Image.blend(coarse, fine, 0.3).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"zib dog number {seed}", encoding="utf-8")
    return folder


def kinds(diagnosis: Diagnosis) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for finding in diagnosis.findings:
        found.setdefault(finding.kind, []).append(finding.pictures)
    return found


def test_nothing_is_found_where_nothing_is_wrong(photos: Path) -> None:
    assert diagnose(photos).findings == ()
    assert [(shape.width, shape.height, shape.pictures) for shape in diagnose(photos).shapes] == [(512, 512, 4)]
    assert diagnose(photos).shapes[0].cut_away == pytest.approx(1 - 512 / 600)


def test_the_embedded_world_is_without_a_warning() -> None:
    assert diagnose(Path("recipes/configs/dreambooth-tiny.yaml")).findings == ()
    assert diagnose(Path("recipes/configs/lora-tiny.yaml")).at("refused") == []


def test_files_that_a_run_would_refuse_are_named_each(photos: Path) -> None:
    whole = (photos / "0.png").read_bytes()
    for number in range(50):  # more than one error message lists
        (photos / f"cut{number}.png").write_bytes(whole[: 100 + number])
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    (photos / "text.jpg").write_text("not a picture", encoding="utf-8")
    (photos / "3.txt").write_bytes(b"\xff\xfe\x00")
    found = diagnose(photos)
    assert len(found.at("refused")) == 53
    told = " ".join(finding.text for finding in found.at("refused"))
    assert all(name in told for name in ("cut0.png", "cut49.png", "dot.png", "text.jpg", "3.txt"))
    assert sorted(found.pictures) == ["0/0.png", "0/1.png", "0/2.png"]


def test_copies_blur_and_size(photos: Path) -> None:
    first = Image.open(photos / "0.png")
    first.resize((900, 768)).save(photos / "scaled.jpg", quality=60)
    (photos / "again.png").write_bytes((photos / "1.png").read_bytes())
    Image.open(photos / "2.png").filter(ImageFilter.GaussianBlur(9)).save(photos / "2.png")
    Image.open(photos / "3.png").resize((300, 256)).save(photos / "3.png")
    for name in ("scaled", "again"):
        (photos / f"{name}.txt").write_text(f"zib dog {name}", encoding="utf-8")
    found = kinds(diagnose(photos))
    assert found == {
        "near copies": [("0/0.png", "0/scaled.jpg")],
        "copies": [("0/1.png", "0/again.png")],
        "blurred": [("0/2.png",)],
        "small": [("0/3.png",)],
    }
    assert diagnose(photos, resolution=128).findings and "small" not in kinds(diagnose(photos, resolution=128))


def test_captions(photos: Path) -> None:
    (photos / "0.txt").unlink()
    (photos / "1.txt").write_text("a dog, " * 40, encoding="utf-8")
    (photos / "2.txt").write_text("Number 3 dog zib", encoding="utf-8")
    found = kinds(diagnose(photos))
    assert found == {
        "no caption": [("0/0.png",)],
        "long caption": [("0/1.png",)],
        "same captions": [("0/2.png", "0/3.png")],
    }
    long = "a zib dog sits on a green hill under old trees near water"
    (photos / "2.txt").write_text(long, encoding="utf-8")
    (photos / "3.txt").write_text(long.replace("green", "steep"), encoding="utf-8")
    assert kinds(diagnose(photos))["near captions"] == [("0/2.png", "0/3.png")]


def test_a_folder_without_captions_only_needs_a_prompt(photos: Path) -> None:
    for path in photos.glob("*.txt"):
        path.unlink()
    assert [(finding.level, finding.kind) for finding in diagnose(photos).findings] == [("note", "no caption")]


def test_a_recipe_says_what_belongs_in_captions(photos: Path, tmp_path: Path) -> None:
    (photos / "3.txt").write_text("a dog", encoding="utf-8")
    concept = {"folder": str(photos), "trigger": "zib", "prompt": "a zib dog", "class_prompt": "a dog"}
    recipe = {
        "recipe": "dreambooth",
        "output": str(tmp_path / "run"),
        "adapter": {"kind": "lora"},
        "data": {"resolution": 512, "concepts": [concept], "wording": {"suffix": "with " + "many " * 20 + "words"}},
        "prior": {"kind": "none"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = diagnose(path)
    assert {finding.kind for finding in found.at("doubtful")} == {"no trigger", "long caption"}
    assert "tokens are cut off" in next(f.text for f in found.findings if f.kind == "long caption")
    assert "3.png" in next(f.text for f in found.findings if f.kind == "no trigger")
    assert kinds(diagnose(path, ["data.wording.prefix=zib"])).keys() == {"long caption"}


def test_the_command_ends_as_a_run_would(photos: Path, tmp_path: Path) -> None:
    page = tmp_path / "doctor.html"
    runner = CliRunner()
    right = runner.invoke(app, ["data", "doctor", str(photos), "--page", str(page)])
    assert right.exit_code == 0 and "4 pictures can be used, and nothing is wrong with them." in right.output
    text = page.read_text(encoding="utf-8")
    assert all(f"{number}.png" in text and f"zib dog number {number}" in text for number in range(4))
    (photos / "again.png").write_bytes((photos / "1.png").read_bytes())
    assert runner.invoke(app, ["data", "doctor", str(photos)]).exit_code == 0
    assert runner.invoke(app, ["data", "doctor", str(photos), "--strict"]).exit_code == 2
    (photos / "cut.png").write_bytes(b"\x89PNG\r\n")
    wrong = runner.invoke(app, ["data", "doctor", str(photos), "--json"])
    record = json.loads(wrong.stdout)
    assert wrong.exit_code == 2 and record["pictures"] == 5 and record["dropped"] == 0
    assert record["sharpness"].keys() == {"0/0.png", "0/1.png", "0/2.png", "0/3.png", "0/again.png"}
    assert record["sharpness"]["0/1.png"] == record["sharpness"]["0/again.png"] > 0.1
    assert {finding["level"] for finding in record["findings"]} == {"refused", "doubtful"}


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"fotos: no such folder or recipe; did you mean 'photos'"):
        diagnose(tmp_path / "fotos")
