"""Several concepts in one run: each is drawn, taught under its own trigger, and shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from finetune.config import read_recipe
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.evaluation import Taught, ask
from finetune.export.sample import adapted
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.sampling import draw
from recipes import dreambooth, lora

WriteRecipe = Callable[..., Path]


@pytest.fixture
def two(subject: Path, tmp_path: Path) -> dict[str, object]:
    """The data of two concepts, of three pictures and of one."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(subject / "0.png", other / "0.png")
    concepts = [
        {"folder": str(subject), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"},
        {"folder": str(other), "prompt": "a wug cross", "class_prompt": "a cross", "trigger": "wug"},
    ]
    return {"resolution": 16, "balance": True, "concepts": concepts, "cache": {"folder": str(tmp_path / "cache")}}


def test_a_report_shows_all_concepts_with_their_triggers_and_classes(
    two: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    report = {"per_prompt": 1, "sampler": {"steps": 2, "guidance": 2.0}}
    dreambooth.main(read_recipe(write_recipe(data=two, report=report)))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in ("zib star, ", "wug cross", "<mark>zib</mark>", "<mark>wug</mark>", "a star", "a cross"):
        assert words in page, words
    assert page.count("data:image/png") >= 4 + 2 * 3 + 2 * 4  # taught, class images, four prompts before and after


def test_class_images_are_drawn_for_each_class(
    two: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    dreambooth.main(read_recipe(write_recipe(data=two)))
    folders = sorted(path.name[:7] for path in (tmp_path / "cache" / "class-images").iterdir())
    assert folders == ["a-cross", "a-star-"]


def test_a_balanced_run_that_stops_and_goes_on_ends_with_the_same_bytes(
    two: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(data=two, recipe="lora", prior={"kind": "none"})
    lora.main(read_recipe(recipe, [f"output={tmp_path / 'whole'}", "train.steps=7"]))
    for steps in (3, 7):
        lora.main(read_recipe(recipe, [f"output={tmp_path / 'parts'}", f"train.steps={steps}"]))
    name = Path("adapters") / "pytorch_lora_weights.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.base
def test_one_lora_learns_two_subjects_under_two_triggers(tmp_path: Path) -> None:
    """Each trigger draws its own subject, and not the other's (DreamBooth, Ruiz et al. 2023, as a joint run)."""
    seeds, triggers = (3, 4), ("zib", "wug")
    concepts = [
        {"folder": f"tinyworld:subject/{seed}", "trigger": trigger}
        for seed, trigger in zip(seeds, triggers, strict=True)
    ]
    changes = [f"output={tmp_path / 'run'}", f"data.concepts={json.dumps(concepts)}", "data.balance=true"]
    changes += [f"data.cache.folder={tmp_path / 'cache'}", "recipe=lora", "prior={kind: none}", "report.enabled=false"]
    recipe = read_recipe(Path("recipes/configs/dreambooth-tiny.yaml"), [*changes, "samples.every=null"])
    lora.main(recipe)
    untouched, trained = load_family(ModelConfig()), adapted(tmp_path / "run" / "adapters", "tinyworld")

    def drawn(family: ModelFamily) -> Callable[[Sequence[str], int], list[Image.Image]]:
        sampler = SamplerConfig(steps=15, guidance=4.0)
        return lambda prompts, count: draw(family, prompts, count, sampler, 0, resolution=64)

    for seed, concept in zip(seeds, recipe.data.concepts, strict=True):
        taught = Taught("subject", seed)
        asked = taught.questions(concept, scenes=5)
        found = taught.evaluate(asked, ask(asked, drawn(untouched)), ask(asked, drawn(trained)))
        assert found.after.normalised - found.before.normalised > 0.3, seed
