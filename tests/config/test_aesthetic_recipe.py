"""What a recipe for an aesthetic embedding may not say."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.checks import contradictions
from finetune.config.schema import Recipe
from finetune.config.summary import summary


def recipe(**sections: Any) -> Recipe:
    concept = {"folder": "pictures", **sections.pop("concept", {})}
    data = {"concepts": [concept], **sections.pop("data", {})}
    plain = {"adapter": {"kind": "aesthetic"}, "report": {"prompts": ["a star"]}, "output": "runs/look", "data": data}
    return Recipe.model_validate({"recipe": "aesthetic", **plain, **sections})


def said(one: Recipe) -> dict[str, str]:
    return {".".join(map(str, found.path)): found.text for found in contradictions(one)}


def test_a_plain_recipe_is_sound() -> None:
    assert said(recipe()) == {}
    assert said(recipe(train={"threads": 1, "device": "cpu"}, report={"enabled": False})) == {}
    assert "steps" not in summary(recipe())


@pytest.mark.parametrize(
    ("sections", "key", "text"),
    [
        ({"train": {"steps": 5}}, "train.steps", "trains no weights"),
        ({"train": {"ema": {"decay": 0.9}}}, "train.ema", "trains no weights"),
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate", "trains no weights"),
        ({"prior": {"kind": "model"}}, "prior.kind", "trains no weights"),
        ({"data": {"flip": True}}, "data.flip", "whole pictures"),
        ({"data": {"caption_dropout": 0.1}}, "data.caption_dropout", "whole pictures"),
        ({"concept": {"masks": "masks"}}, "data.concepts.0.masks", "whole pictures"),
        ({"samples": {"every": 5}}, "samples.every", "no steps"),
        ({"checkpoint": {"every": 5}}, "checkpoint.every", "no steps"),
        ({"model": {"path": "some/model"}}, "adapter.clip", "openai/clip-vit-large-patch14"),
        ({"report": {}}, "report.prompts", "is empty"),
        ({"adapter": {"kind": "aesthetic", "steps": 0, "bake_prompts": ["a"]}}, "adapter.bake_prompts", "steps is 0"),
        (
            {"adapter": {"kind": "aesthetic", "bake_prompts": ["a"]}, "export": {"formats": ["a1111"]}},
            "adapter.bake_prompts",
            "diffusers or kohya",
        ),
        ({"export": {"formats": ["kohya"]}}, "export.formats", "diffusers or a1111"),
        ({"adapter": {"kind": "lora"}}, "adapter.kind", "must be aesthetic"),
    ],
)
def test_what_has_no_part_is_refused(sections: dict[str, Any], key: str, text: str) -> None:
    assert text in said(recipe(**sections))[key]


def test_the_base_that_brings_its_clip_needs_none_named() -> None:
    named = recipe(model={"path": "some/model"}, adapter={"kind": "aesthetic", "clip": "some/clip"})
    assert said(named) == {}
