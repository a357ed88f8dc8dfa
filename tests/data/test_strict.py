"""With ``data.strict`` a run ends before it begins where something is doubtful; plan and doctor say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data_tools.doctor import diagnose
from finetune.config import read_recipe
from finetune.config.schema import Recipe
from finetune.data import prepare
from finetune.errors import UserError
from finetune.plan import plan
from finetune.train.run import decisive
from recipes import aesthetic

Make = Callable[..., Recipe]
Folder = Callable[..., Path]
PRIOR: dict[str, Any] = {"kind": "images", "count": 2, "sampler": {"steps": 1}}
CONCEPT: dict[str, Any] = {"prompt": "a zib star", "trigger": "zib", "class_prompt": "a star"}
DOUBTS = (
    r"1 entry ignored: notes.md",
    r"1 caption lacks the trigger 'zib': 1.png",
    r"the same picture more than once: 2.png = 4.png",
    r"1 picture has no caption of its own and takes the prompt: 3.png",
    r"5 of \d+ pictures are enlarged more than 1.5 times",
    r"1 of \d+ captions are too long: 'zib (word )+word' loses \d+ tokens",
)


@pytest.fixture
def doubtful(folder: Folder) -> Path:
    photos = folder(5)
    (photos / "notes.md").write_text("notes")
    (photos / "0.txt").write_text("zib" + " word" * 40)
    (photos / "1.txt").write_text("a star")
    (photos / "3.txt").unlink()
    (photos / "4.png").write_bytes((photos / "2.png").read_bytes())
    return photos


def test_everything_doubtful_is_said_at_once_before_anything_is_drawn_or_encoded(
    doubtful: Path, make_recipe: Make, fake: Any
) -> None:
    family = fake()
    recipe = make_recipe(doubtful, data={"strict": True, "resolution": 40}, concept=CONCEPT, prior=PRIOR)
    with pytest.raises(UserError, match="data.strict: 6 things are doubtful:\n" + "\n".join(f".*{d}" for d in DOUBTS)):
        prepare(recipe, family)
    assert (family.pictures, family.captions, family.drawn) == (0, [], [])
    lax = recipe.model_copy(update={"data": recipe.data.model_copy(update={"strict": False})})
    notes = prepare(lax, family).describe()["notes"]
    assert len(notes) == 7 and notes[6].startswith("5 of 7 pictures are smaller")  # a note that doubts nothing


def test_what_is_in_order_runs(make_recipe: Make, folder: Folder, fake: Any) -> None:
    """Pictures that are enlarged a little are no reason to stop."""
    batches = prepare(make_recipe(folder(3), data={"strict": True, "resolution": 28}, concept=CONCEPT), fake())
    assert batches.notes == ["3 of 3 pictures are smaller than 28 pixels and are enlarged"]


@pytest.fixture
def written(doubtful: Path, tiny_sd: Path, tmp_path: Path) -> Path:
    tree = {
        "recipe": "dreambooth",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {
            "strict": True,
            "resolution": 40,
            "concepts": [{"folder": str(doubtful), **CONCEPT}],
            "cache": {"folder": str(tmp_path / "cache")},
        },
        "prior": PRIOR,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_plan_and_doctor_refuse_the_same(written: Path) -> None:
    recipe = read_recipe(written)
    with pytest.raises(UserError, match="data.strict: 6 things are doubtful:\n" + "\n".join(f".*{d}" for d in DOUBTS)):
        plan(recipe)
    refused = [finding.text for finding in diagnose(written).at("refused")]
    assert len(refused) == 6
    with pytest.raises(UserError) as said:
        plan(recipe)
    assert str(said.value).splitlines()[1:] == [f"  {text}" for text in refused]
    assert not diagnose(written, ["data.strict=false"]).at("refused")
    assert plan(read_recipe(written, ["data.strict=false"])).notes


def test_a_run_may_be_continued_with_or_without(written: Path) -> None:
    assert decisive(read_recipe(written)) == decisive(read_recipe(written, ["data.strict=false"]))


def test_recipes_that_take_no_steps_have_it_too(folder: Folder, tmp_path: Path) -> None:
    photos = folder(2, captions=False)
    Image.new("RGB", (24, 24), "red").save(photos / "0.png")
    (photos / "1.png").write_bytes((photos / "0.png").read_bytes())
    recipe = Recipe.model_validate(
        {
            "recipe": "aesthetic",
            "output": str(tmp_path / "run"),
            "adapter": {"kind": "aesthetic"},
            "data": {"strict": True, "concepts": [{"folder": str(photos)}], "resolution": 64},
            "report": {"prompts": ["a star"]},
        }
    )
    for refuse in (plan, aesthetic.main):
        with pytest.raises(UserError, match=r"data.strict: 1 thing is doubtful:\n.*the same picture more than once"):
            refuse(recipe)
