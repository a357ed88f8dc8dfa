"""``finetune data masks``: what is written is what a run reads, nothing is overwritten, nothing is silent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from data_tools.masking import folder as folders
from finetune.cli import app
from finetune.config import read_recipe
from finetune.config.schema import ConceptConfig, DataConfig
from finetune.data import Batches, scan
from finetune.data.encode import Latents
from finetune.denoise import masked_mean
from finetune.errors import UserError
from finetune.families import load_family
from finetune.tinyworld.subject import instance_scenes, subject

ROOT = Path(__file__).parents[3]
Masks = Callable[..., Result]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of a dark thing before a light ground; the second lies on its side until EXIF turns it upright."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, box in (("a.png", (4, 4, 20, 14)), ("b.jpg", (10, 6, 30, 20))):
        image = Image.new("RGB", (40, 24), "white")
        image.paste("navy", box)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        image.save(folder / name, **({"exif": exif, "quality": 95} if name == "b.jpg" else {}))
    return folder


@pytest.fixture
def masks(tmp_path: Path, photos: Path) -> Masks:
    def run(*options: str, source: Path = photos, out: Path = tmp_path / "masks") -> Result:
        return CliRunner().invoke(app, ["data", "masks", str(source), "--out", str(out), *options])

    return run


def test_a_run_reads_what_is_written(masks: Masks, photos: Path, tmp_path: Path) -> None:
    done = masks("--threshold", "border")
    assert done.exit_code == 0, done.output
    assert "2 masks made, 0 were there, 0 pictures without one" in done.output
    assert f"a.png: {100 * 160 / 960:.1f} % of a.png" in done.output
    found = {path.name: Image.open(path) for path in (tmp_path / "masks").iterdir()}
    assert {name: (image.mode, image.size) for name, image in found.items()} == {
        "a.png": ("L", (40, 24)),
        "b.png": ("L", (24, 40)),  # upright
    }
    assert np.asarray(found["a.png"]).sum() == 255 * 16 * 10
    assert found["b.png"].getbbox() == (4, 10, 18, 30)
    data = DataConfig(concepts=[ConceptConfig(folder=str(photos), prompt="a dog", masks=str(tmp_path / "masks"))])
    assert [Path(str(p.mask)).name for p in scan(data)[0].pictures] == ["a.png", "b.png"]


def test_what_is_there_stays_and_the_rest_is_made(masks: Masks, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    out.mkdir()
    Image.new("L", (24, 40), 7).save(out / "b.webp", lossless=True)
    kept = (out / "b.webp").read_bytes()
    done = masks("--threshold", "border")
    assert "1 masks made, 1 were there" in done.output and "b.webp: 2.7 % of b.jpg, was there" in done.output
    assert (out / "b.webp").read_bytes() == kept and not (out / "b.png").exists()
    first = (out / "a.png").stat().st_mtime_ns
    assert "0 masks made, 2 were there" in masks("--threshold", "light").output
    assert (out / "a.png").stat().st_mtime_ns == first
    done = masks("--threshold", "light", "--overwrite")
    assert done.exit_code == 2 and "b.webp is a mask of it too, and would be read" in done.output
    assert np.asarray(Image.open(out / "a.png"))[0, 0] == 255  # made anew


def test_broken_pictures_and_empty_masks_are_said_and_not_written(masks: Masks, photos: Path, tmp_path: Path) -> None:
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Image.new("RGB", (30, 30), "red").save(photos / "d.png")
    done = masks("--threshold", "border")
    assert done.exit_code == 2
    assert "no mask: " in done.output and "c.png: is broken or cut short" in done.output
    assert "d.png: nothing was found in it, and its mask would be empty" in done.output
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "b.png"]


def test_one_picture_by_points(masks: Masks, photos: Path, tmp_path: Path, tiny_sam: Path) -> None:
    done = masks("--points", "10,8", "--negative", "0.9,0.9", "--model", str(tiny_sam), source=photos / "a.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "masks" / "a.png").size == (40, 24)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"file_name": "b.jpg", "box": [0.2, 0.2, 0.8, 0.8]}))
    done = masks("--prompts", str(lines), "--model", str(tiny_sam))
    assert "1 were there" in done.output and "1 masks made" in done.output


def test_words_and_outlines(masks: Masks, tiny_clipseg: Path, tiny_sam2: Path, tmp_path: Path) -> None:
    soft = masks("--text", "a star", "--model", str(tiny_clipseg), "--soft", "--cut", "0.05", "--feather", "1")
    assert soft.exit_code == 0, soft.output
    assert len(np.unique(np.asarray(Image.open(tmp_path / "masks" / "a.png")))) > 20
    both = masks("--text", "a star", "--model", str(tiny_clipseg), "--model", str(tiny_sam2), "--overwrite")
    assert both.exit_code == 0, both.output


def test_one_mask_is_carried_over(masks: Masks, photos: Path, tiny_sam: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 24), 0).save(tmp_path / "mask.png")
    mask = Image.new("L", (40, 24))
    mask.paste(255, (4, 4, 20, 14))
    mask.save(tmp_path / "mask.png")
    asked = ["--reference", str(photos / "a.png"), "--reference-mask", str(tmp_path / "mask.png")]
    done = masks(*asked, "--model", str(tiny_sam))
    assert "a.png: 16.7 % of a.png" in done.output  # the annotated one itself
    assert (tmp_path / "masks" / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], r"one way to a mask must be asked for, found none; there are: --threshold; --alpha; --text"),
        (["--alpha", "--text", "x"], r"found --alpha and --text"),
        (["--alpha", "--model", "x"], r"--model x: --alpha needs no model"),
        (["--reference", "a.png"], r"--reference-mask: is missing"),
        (["--threshold", "border", "--sheet", "a.gif"], r"a.gif: must end with .html or .png"),
        (["--text", "a", "--model", "SAM"], r"--text: a SAM reads no words"),
        (["--points", "1,2", "--model", "CLIPSEG"], r"expected one SAM or SAM 2; a CLIPSeg belongs to --text"),
        (["--points", "1,2", "--prompts", "none.jsonl", "--model", "SAM"], r"none.jsonl: cannot be read"),
    ],
)
def test_what_was_asked_for_wrongly_is_said(
    options: list[str], said: str, masks: Masks, tiny_sam: Path, tiny_clipseg: Path, tmp_path: Path
) -> None:
    named = {"SAM": str(tiny_sam), "CLIPSEG": str(tiny_clipseg)}
    done = masks(*(named.get(option, option) for option in options))
    assert isinstance(done.exception, UserError)
    assert re.search(said, str(done.exception))
    assert not (tmp_path / "masks").exists()


def test_masks_never_lie_among_their_pictures(masks: Masks, photos: Path) -> None:
    assert "is the folder of the pictures" in str(masks("--threshold", "border", out=photos).exception)
    Image.new("RGB", (9, 9)).save(photos / "a.webp")
    with pytest.raises(UserError, match=r"a.webp: would have the mask of a.png"):
        folders.pictures(photos)


def test_the_sheet_shows_outlines_and_shares(masks: Masks, tmp_path: Path) -> None:
    masks("--threshold", "border", "--sheet", str(tmp_path / "sheet.png"))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    assert (sheet == (255, 0, 160)).all(1).sum() > 50
    masks("--threshold", "border", "--sheet", str(tmp_path / "sheet.html"))
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2 and "a.png: 16.7 % counts, was there" in page


def test_two_processes_share_the_pictures(photos: Path, tmp_path: Path) -> None:
    for number in range(3):
        (photos / f"more-{number}.png").write_bytes((photos / "a.png").read_bytes())
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml")]
    command = ["-m", "finetune", "data", "masks", str(photos), "--out", str(tmp_path / "m"), "--threshold", "border"]
    sheet = ["--sheet", str(tmp_path / "sheet.png")]
    done = subprocess.run([sys.executable, *launcher, *command, *sheet], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 masks made, 0 were there") == 1
    assert len(list((tmp_path / "m").iterdir())) == 5 and (tmp_path / "sheet.png").exists()


def test_masked_dreambooth_learns_from_masks_that_were_made(tmp_path: Path, tiny_sd: Path, masks: Masks) -> None:
    """From pictures to the loss: what the tool finds is where the batches of a run look."""
    folder = tmp_path / "subject"
    folder.mkdir()
    one = subject(0)
    for number, scene in enumerate(instance_scenes(one)):
        one.render(scene)[0].save(folder / f"{number}.png")
    done = masks("--threshold", "border", "--fill", "--largest", source=folder)
    assert done.exit_code == 0, done.output
    concept = {"folder": str(folder), "prompt": "a zib star", "masks": str(tmp_path / "masks")}
    tree = {
        "recipe": "lora",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 64, "concepts": [concept], "cache": {"folder": str(tmp_path / "cache")}},
        "train": {"batch_size": 5, "threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    family = load_family(recipe.model)
    batch = next(iter(Batches(recipe, family, scan(recipe.data), [], Latents(family, recipe.data), None)))
    assert batch.mask is not None
    side = 64 // family.latent_scale
    for row, name in enumerate(batch.ids):
        true = one.render(instance_scenes(one)[int(Path(name).stem)])[1]
        expected = np.asarray(true.resize((side, side), Image.Resampling.BOX), dtype=float) / 255
        assert np.abs(batch.mask[row, 0].numpy() - expected).mean() < 0.05
    answer = torch.zeros(5, 4, side, side, requires_grad=True)
    masked_mean((answer - 1).square(), batch.mask).sum().backward()
    assert answer.grad is not None
    assert torch.equal(answer.grad != 0, (batch.mask != 0).expand(5, 4, side, side))
