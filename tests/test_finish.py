"""What a finished run is asked: its own subject or style, or what its recipe and its concepts bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune import finish
from finetune.config.schema import Recipe
from finetune.data import Concept, scan
from finetune.evaluation import Questions, Taught


def recipe_of(tmp_path: Path, *concepts: dict[str, Any], prompts: list[str] | None = None, **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "recipe": "lora",
            "output": str(tmp_path / "run"),
            "adapter": {"kind": "lora"},
            "data": {"resolution": 64, "concepts": list(concepts), "cache": {"folder": str(tmp_path / "cache")}},
            "report": {"prompts": prompts or [], "per_prompt": 3},
            **keys,
        }
    )


def asked(recipe: Recipe) -> tuple[list[Taught | None], Questions, list[Concept]]:
    concepts, taught = scan(recipe.data), finish._taught(recipe)
    return taught, finish._questions(recipe, concepts, taught), concepts


@pytest.mark.parametrize("kind", ["subject", "style"])
def test_one_concept_of_the_embedded_world_is_asked_its_own_questions(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"folder": f"tinyworld:{kind}/3", "trigger": "wug"})
    taught, questions, concepts = asked(recipe)
    assert taught == [Taught.of(recipe.data.concepts[0])]
    assert questions == taught[0].questions(concepts[0].config)
    assert len(questions.scenes) == 10 and all("wug" in prompt for prompt, _ in questions.scenes)
    assert finish._title(concepts, recipe) == ("wug heart" if kind == "subject" else "style wug")


def test_prompts_without_the_trigger_are_asked_apart(tmp_path: Path) -> None:
    prompts = ["a red star in the style of fep", "a red star"]
    taught, questions, _ = asked(recipe_of(tmp_path, {"folder": "tinyworld:style/3"}, prompts=prompts))
    assert taught == [Taught("style", 3)]
    assert questions.scenes == ((prompts[0], {}),) and questions.plain == (prompts[1],)
    _, questions, _ = asked(recipe_of(tmp_path, {"folder": "tinyworld:style/3"}, prompts=["a star", "a heart"]))
    assert [prompt for prompt, _ in questions.scenes] == ["a star", "a heart"] and questions.plain == ()


def test_several_concepts_are_all_asked_for(tmp_path: Path) -> None:
    pair = [{"folder": "tinyworld:subject/3", "trigger": "zib"}, {"folder": "tinyworld:subject/4", "trigger": "wug"}]
    taught, questions, concepts = asked(recipe_of(tmp_path, *pair))
    assert taught == [Taught("subject", 3), Taught("subject", 4)]
    prompts = [prompt for prompt, _ in questions.scenes]
    assert [sum(word in prompt for prompt in prompts) for word in ("zib", "wug")] == [3, 4]
    assert questions.instance == "a zib heart" and "a wug triangle" in prompts
    assert questions.class_prompt == "a heart" and questions.plain == ("a triangle",)
    assert questions.pictures == (7 + 1) * 3 + 3 + 3
    assert finish._title(concepts, recipe_of(tmp_path, *pair)) == "zib heart, wug triangle"
    assert len(finish._pictures(concepts)) == 10


def test_another_model_knows_nothing_of_the_embedded_world(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"folder": "tinyworld:subject/3"}, model={"path": "somewhere"})
    taught, questions, _ = asked(recipe)
    assert taught == [None] and questions.scenes == () and questions.class_prompt == "a heart"
