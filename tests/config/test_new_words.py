"""Recipes of new words that contradict themselves are refused with a reason (METHODS 2)."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.adapters import EmbeddingConfig, new_words
from finetune.config.checks import contradictions
from finetune.config.schema import Recipe


def recipe(
    *tokens: dict[str, Any], concept: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **adapter: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "recipe": "textual_inversion",
            "output": "run",
            "adapter": {"kind": "embedding", "tokens": list(tokens) or [{"token": "<zib>", "vectors": 3}], **adapter},
            "data": {"concepts": [{"folder": "pictures", **(concept or {})}]},
            "train": train or {},
        }
    )


def found(one: Recipe) -> list[str]:
    return [f"{'.'.join(map(str, path))} {text}" for path, text in contradictions(one)]


def test_a_plain_recipe_is_right() -> None:
    assert found(recipe(templates="object", norm={"kind": "std"}, progressive_steps=400)) == []


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (recipe({"token": "<a>"}, {"token": "<a>"}), "adapter.tokens.0.token must be no part of another word"),
        (recipe({"token": "<a>"}, {"token": "x<A>"}), "'<a>' is part of 'x<A>'"),
        (recipe({"token": "<a>", "vectors": 2}, {"token": "<a>_1"}), "'<a>' is part of '<a>_1'"),
        (recipe(progressive_steps=500), "adapter.progressive_steps must be less: '<zib>' is whole after 1000 steps"),
        (recipe(norm={"kind": "std", "target": 0.4}), "adapter.norm.target is set, but std keeps the spread"),
        (
            recipe(concept={"class_prompt": "a photo of <zib> star"}),
            "data.concepts.0.class_prompt must not contain the new word '<zib>'",
        ),
        (
            recipe({"token": "<a>"}, {"token": "<b>"}, templates="style"),
            r"data.concepts.0.trigger must say which new word [name] in the templates is here: <a> or <b>",
        ),
    ],
)
def test_contradictions_name_key_and_reason(one: Recipe, message: str) -> None:
    assert any(message in text for text in found(one)), found(one)


def test_a_pivotal_recipe_is_asked_the_same() -> None:
    words = {"kind": "embedding", "tokens": [{"token": "<a>"}, {"token": "<b>"}], "templates": "object"}
    pivotal = Recipe.model_validate(
        {
            "recipe": "pivotal",
            "output": "run",
            "adapter": {"kind": "pivotal", "embedding": words, "weights": {"kind": "lora"}},
            "data": {"concepts": [{"folder": "pictures", "trigger": "<a><b>"}]},
        }
    )
    assert found(pivotal) == []
    section = new_words(pivotal.adapter)
    assert isinstance(section, EmbeddingConfig) and section.words == {"<a>": 1, "<b>": 1}
    assert section.name("<a><b> dog") == "<a><b> dog" and section.name("dog") is None
