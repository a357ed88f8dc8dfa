"""Class images: drawn once, by the untouched model, the same ones whatever is missing and whoever draws."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import at_once

from finetune import files
from finetune.config.schema import NoPrior, Recipe
from finetune.data import class_images, decoding, scan
from finetune.data.prior import drawn_for, foreseen
from finetune.errors import GuardError, UserError
from finetune.family import ModelFamily

PRIOR: dict[str, Any] = {"kind": "images", "count": 7, "batch_size": 3, "sampler": {"steps": 2}}
Make = Callable[..., Recipe]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def recipe(make_recipe: Make, folder: Callable[..., Path]) -> Recipe:
    return make_recipe(folder(2), prior=PRIOR)


def draw(recipe: Recipe, family: Any, processes: Any = None) -> Path:
    return class_images(recipe, family, scan(recipe.data), processes)[0].path.parent


def test_images_are_foreseen_as_they_will_be(recipe: Recipe, fake: Any) -> None:
    """A plan, a doctor and a sheet see the order and the captions of the run without drawing anything."""
    concepts = scan(recipe.data)
    expected, family = foreseen(recipe, concepts), fake()
    drawn = class_images(recipe, family, concepts)
    for one, other in zip(expected, drawn, strict=True):
        assert (one.id, one.captions, one.prior) == (other.id, other.captions, True)
        assert (one.facts.width, one.facts.height) == (other.facts.width, other.facts.height)
    assert len({one.facts.sha256 for one in expected}) == 7
    assert foreseen(recipe.model_copy(update={"prior": NoPrior(kind="none")}), concepts) == []


def test_a_real_model_draws_them_once_and_bit_for_bit_again(recipe: Recipe, tiny_family: ModelFamily) -> None:
    folder = draw(recipe, tiny_family)
    first = contents(folder)
    assert sorted(first) == [*(f"{index:05}.png" for index in range(7)), "manifest.json"]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert draw(recipe, tiny_family) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times  # nothing was drawn or written
    for index in (0, 4, 6):
        (folder / f"{index:05}.png").unlink()
    draw(recipe, tiny_family)
    assert contents(folder) == first
    assert {path for path in folder.iterdir() if path.stat().st_mtime_ns != times[path]} == {
        folder / f"{index:05}.png" for index in (0, 4, 6)
    }
    assert len({first[f"{index:05}.png"] for index in range(7)}) == 7


def test_the_weights_are_untouched_before_and_after(recipe: Recipe, tiny_family: ModelFamily) -> None:
    tiny_family.require("denoiser", "vae", "text_encoder")

    def fingerprint() -> str:
        tensors = tiny_family.networks.state_dict()
        return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()

    before = fingerprint()
    draw(recipe, tiny_family)
    assert fingerprint() == before
    assert set(tiny_family.networks) == {"denoiser", "vae", "text_encoder"}


def test_a_model_that_trains_already_is_refused(recipe: Recipe, fake: Any) -> None:
    family = fake()
    family.require("denoiser")
    family.networks.requires_grad_(True)
    with pytest.raises(GuardError, match="untouched model"):
        draw(recipe, family)


def test_more_images_keep_those_that_are_there(make_recipe: Make, folder: Callable[..., Path], fake: Any) -> None:
    photos = folder(2)
    few = draw(make_recipe(photos, prior=PRIOR | {"count": 4}), fake())
    first = contents(few)
    family = fake()
    assert draw(make_recipe(photos, prior=PRIOR | {"count": 8}), family) == few
    assert family.drawn == [3, 3]  # the groups 3 to 5 and 6 to 8; image 3 is kept
    assert {name: contents(few)[name] for name in first if name != "manifest.json"} == {
        name: content for name, content in first.items() if name != "manifest.json"
    }
    assert len(json.loads((few / "manifest.json").read_text())["files"]) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"prior": PRIOR | {"sampler": {"steps": 3}}},
        {"prior": PRIOR | {"sampler": {"steps": 2, "guidance": 1.5}}},
        {"concept": {"class_prompt": "a moon"}},
        {"data": {"resolution": 20}},
        {"seed": 1},
    ],
)
def test_another_setting_is_another_folder(
    change: dict[str, Any], make_recipe: Make, folder: Callable[..., Path], fake: Any
) -> None:
    photos = folder(2)
    before = draw(make_recipe(photos, prior=PRIOR), fake())
    assert draw(make_recipe(photos, **{"prior": PRIOR, **change}), fake()) != before
    assert draw(make_recipe(photos, prior=PRIOR), fake("b")) != before


def test_a_damaged_image_is_drawn_again(recipe: Recipe, fake: Any) -> None:
    folder = draw(recipe, fake())
    whole = contents(folder)
    Image.new("RGB", (16, 16)).save(folder / "00002.png")  # whole, but not what the manifest says
    (folder / "00005.png").write_bytes(whole["00005.png"][:50])
    assert contents(draw(recipe, fake())) == whole


def test_an_interrupted_drawing_leaves_no_half_file_and_is_continued(
    recipe: Recipe, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(draw(recipe, fake()))
    folder = drawn_for(recipe, recipe.prior, fake(), "a star").folder  # type: ignore[arg-type]
    for path in folder.iterdir():
        path.unlink()
    context = get_context("fork")
    save = Image.Image.save

    def slowly(image: Image.Image, path: Path, **options: Any) -> None:
        save(image, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        time.sleep(0.1)
        path.write_bytes(content)

    monkeypatch.setattr(Image.Image, "save", slowly)
    for killed_after in (0.05, 0.15, 0.4):
        drawer = context.Process(target=draw, args=(recipe, fake()))
        drawer.start()
        deadline = time.time() + 10
        while time.time() < deadline and not any(folder.iterdir()):
            time.sleep(0.005)
        time.sleep(killed_after)
        os.kill(drawer.pid or 0, signal.SIGKILL)
        drawer.join()
        for path in folder.glob("[0-9]*.png"):
            decoding.inspect(path)
    monkeypatch.undo()
    leftovers = list(folder.glob(f"{files.PARTIAL}*"))
    assert leftovers
    for leftover in leftovers:
        os.utime(leftover, (0, 0))  # an hour later
    assert contents(draw(recipe, fake())) == whole


def test_two_processes_share_the_work_and_agree_with_one(recipe: Recipe, fake: Any, tmp_path: Path) -> None:
    alone = contents(draw(recipe, fake()))
    folder = drawn_for(recipe, recipe.prior, fake(), "a star").folder  # type: ignore[arg-type]
    for path in folder.iterdir():
        path.unlink()
    families = [fake(), fake()]
    at_once(lambda processes: draw(recipe, families[processes.rank], processes), world=2)
    assert [family.drawn for family in families] == [[3, 3], [3]]
    assert contents(folder) == alone


def test_own_pictures_of_the_class_are_used_as_they_are(
    make_recipe: Make, folder: Callable[..., Path], fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = folder(4, "stars", captions=False)
    (own / "readme.md").write_text("mine")
    before = contents(own)
    family = fake()
    recipe = make_recipe(folder(2), prior=PRIOR | {"count": 4, "folder": str(own)})
    pictures = class_images(recipe, family, scan(recipe.data))
    assert [picture.captions for picture in pictures] == [("a star",)] * 4
    assert all(picture.prior for picture in pictures)
    assert "ignored: readme.md" in caplog.text
    assert family.drawn == []
    assert contents(own) == before


def test_too_few_own_pictures_say_what_to_do(make_recipe: Make, folder: Callable[..., Path], fake: Any) -> None:
    recipe = make_recipe(folder(2), prior=PRIOR | {"folder": str(folder(4, "stars"))})
    with pytest.raises(UserError, match=r"holds 4 pictures, prior.count asks for 7; add pictures, lower the count"):
        class_images(recipe, fake(), scan(recipe.data))


def test_own_pictures_of_two_classes_cannot_share_a_folder(
    make_recipe: Make, folder: Callable[..., Path], fake: Any
) -> None:
    recipe = make_recipe(folder(2), folder(2, "moons"), prior=PRIOR | {"count": 4, "folder": str(folder(4, "own"))})
    two = recipe.data.concepts[0], recipe.data.concepts[1].model_copy(update={"class_prompt": "a moon"})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"concepts": list(two)})})
    with pytest.raises(UserError, match="one class, but the concepts have 2"):
        class_images(recipe, fake(), scan(recipe.data))


def test_a_prior_folder_without_pictures_is_where_they_are_kept(
    make_recipe: Make, folder: Callable[..., Path], fake: Any, tmp_path: Path
) -> None:
    recipe = make_recipe(folder(2), prior=PRIOR | {"folder": str(tmp_path / "kept")})
    assert draw(recipe, fake()).parent == tmp_path / "kept"
    assert draw(recipe, fake()).parent == tmp_path / "kept"


def test_a_concept_without_a_class_prompt_is_named(make_recipe: Make, folder: Callable[..., Path], fake: Any) -> None:
    recipe = make_recipe(folder(2), prior=PRIOR, concept={"class_prompt": None})
    with pytest.raises(UserError, match=r"data.concepts\[0\]: prior preservation needs class_prompt"):
        class_images(recipe, fake(), scan(recipe.data))


def test_no_other_prior_draws(make_recipe: Make, folder: Callable[..., Path], fake: Any) -> None:
    family = fake()
    for kind in ("none", "model"):
        recipe = make_recipe(folder(2, kind), prior={"kind": kind})
        assert class_images(recipe, family, scan(recipe.data)) == []
    assert not family.networks
