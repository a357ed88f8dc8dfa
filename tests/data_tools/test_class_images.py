"""Class images without a recipe are those that a run with the same settings draws, and a folder is never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from ranks import at_once
from typer.testing import CliRunner

from data_tools.class_images import fill, folders, read_prompts
from finetune.cli import app
from finetune.config import read_recipe
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.config.wording import FolderName
from finetune.data import class_images, scan
from finetune.data.drawing import Drawing
from finetune.data.processes import Alone
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily

DRAWING = Drawing(count=3, sampler=SamplerConfig(steps=1), resolution=16, seed=4, batch_size=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def run(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["data", "class-images", *arguments])
    if found.exception:
        raise found.exception
    return found.output


def test_they_are_those_of_a_run_and_a_run_uses_them(tiny_sd: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "reg" / "1_star"
    photos.mkdir()
    Image.new("RGB", (16, 16)).save(photos / "a.png")
    options = {"count": 3, "steps": 1, "seed": 4, "size": 16, "batch-size": 2, "model": tiny_sd, "out": out}
    command = ["--prompt", "a star", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    assert run(*command).endswith(f"{out}: 3 class images\n")
    recipe = {
        "recipe": "dreambooth",
        "output": str(tmp_path / "run"),
        "seed": 4,
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora"},
        "data": {
            "resolution": 16,
            "concepts": [{"folder": str(photos), "prompt": "zib", "class_prompt": "a star", "trigger": "zib"}],
            "cache": {"folder": str(tmp_path / "cache")},
        },
        "prior": {"kind": "images", "count": 3, "batch_size": 2, "sampler": {"steps": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def pictures(*overrides: str) -> list[Any]:
        found = read_recipe(tmp_path / "recipe.yaml", list(overrides))
        return class_images(found, load_family(found.model), scan(found.data))

    whole = contents(out)
    assert contents(pictures()[0].path.parent) == whole
    used = pictures(f"prior.folder={out}")
    assert {one.path.parent for one in used} == {out} and {one.captions for one in used} == {("a star",)}
    (out / "00001.png").unlink()
    run(*command)
    assert contents(out) == whole


def test_a_folder_of_other_pictures_is_refused(tiny_family: ModelFamily, tmp_path: Path) -> None:
    out = tmp_path / "1_star"
    fill({out: "a star"}, tiny_family, DRAWING, Alone())
    before = contents(out)
    other = Drawing(count=3, sampler=SamplerConfig(steps=2), resolution=16, seed=4, batch_size=2)
    with pytest.raises(UserError, match="drawn with steps 1, not 2; use another folder"):
        fill({out: "a star"}, tiny_family, other, Alone())
    with pytest.raises(UserError, match="drawn with prompt 'a star', not 'a moon'"):
        fill({out: "a moon"}, tiny_family, DRAWING, Alone())
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (16, 16)).save(own / "mine.png")
    with pytest.raises(UserError, match=r"holds mine.png, which was not drawn here"):
        fill({tmp_path / "new": "a moon", own: "a star"}, tiny_family, DRAWING, Alone())
    assert contents(out) == before and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"--size is 17; .* needs a multiple of"):
        fill({out: "a star"}, tiny_family, Drawing(**{**vars(DRAWING), "resolution": 17}), Alone())


def test_what_was_interrupted_keeps_its_settings(
    tiny_family: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are there before the end belong to the settings that they were begun with."""
    real, saved = Image.Image.save, [0]

    def once(image: Image.Image, path: Path, **options: Any) -> None:
        saved[0] += 1
        if saved[0] == 2:
            raise KeyboardInterrupt
        real(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", once)
    with pytest.raises(KeyboardInterrupt):
        fill({tmp_path / "a": "a star"}, tiny_family, DRAWING, Alone())
    monkeypatch.undo()
    assert len(contents(tmp_path / "a")) == 1
    with pytest.raises(UserError, match="drawn with seed 4, not 5"):
        fill({tmp_path / "a": "a star"}, tiny_family, Drawing(**{**vars(DRAWING), "seed": 5}), Alone())
    fill({tmp_path / "a": "a star"}, tiny_family, DRAWING, Alone())
    fill({tmp_path / "b": "a star"}, tiny_family, DRAWING, Alone())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]) == 3


def test_processes_share_the_work(tiny_sd: Path, tiny_family: ModelFamily, tmp_path: Path) -> None:
    fill({tmp_path / "alone": "a star"}, tiny_family, DRAWING, Alone())
    wanted = {tmp_path / "both": "a star"}
    families = [load_family(ModelConfig(path=str(tiny_sd))) for _ in range(2)]
    for family in families:
        family.require("denoiser", "vae", "text_encoder")  # transformers loads in one thread at a time alone
    at_once(lambda processes: fill(wanted, families[processes.rank], DRAWING, processes), world=2)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_prompts_of_a_file_have_folders_that_kohya_reads(tiny_sd: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa photo of a dog\n\n  a dog,  at night \na photo of a dog\n", encoding="utf-8")
    assert read_prompts(prompts) == ["a photo of a dog", "a dog, at night", "a photo of a dog"]
    command = ["--prompts", str(prompts), "--out", str(tmp_path / "reg"), "--model", str(tiny_sd), "--steps", "1"]
    run(*command, "--count", "1", "--size", "16")
    found = {FolderName.of(path.name) for path in (tmp_path / "reg").iterdir()}
    assert found == {FolderName(1, "a photo of a dog"), FolderName(1, "a dog, at night")}
    assert len(list((tmp_path / "reg").glob("*/00000.png"))) == 2
    with pytest.raises(UserError, match="would be the same folder"):
        folders(["a dog/cat", "a dog cat"], tmp_path)
    with pytest.raises(UserError, match="cannot be a folder's name"):
        folders(["word " * 60], tmp_path)
    for content, told in ((b"\n \n", "holds no prompts"), (b"a\xff", r"is not UTF-8 \(byte 1\)")):
        prompts.write_bytes(content)
        with pytest.raises(UserError, match=told):
            read_prompts(prompts)


@pytest.mark.parametrize(
    "arguments", [[], ["--prompt", "a"], ["--out", "x"], ["--prompt", "a", "--prompts", "b", "--out", "x"]]
)
def test_what_to_draw_and_where_must_be_said(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="give a recipe, or what to draw and where"):
        run(*arguments)
    with pytest.raises(UserError, match="give either a recipe, or --prompt and --out"):
        run("recipe.yaml", "--prompt", "a", "--out", "x")
