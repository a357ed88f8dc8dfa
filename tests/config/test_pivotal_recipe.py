"""What a recipe for words and weights together may not say."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.checks import contradictions
from finetune.config.schema import Recipe

WORDS = {"kind": "embedding", "tokens": [{"token": "<t>", "vectors": 2}]}
LORA, FULL = {"kind": "lora"}, {"kind": "full", "select": "cross-kv"}


def recipe(weights: dict[str, Any] = LORA, words: dict[str, Any] = WORDS, **sections: Any) -> Recipe:
    section = {"kind": "pivotal", "embedding": words, "weights": weights, **sections.pop("adapter", {})}
    data = {"concepts": [{"folder": "pictures", "prompt": "a <t>", "trigger": "<t>"}]}
    plain = {"recipe": "pivotal", "output": "runs/look", "data": data, "adapter": section}
    return Recipe.model_validate({**plain, **sections})


def said(one: Recipe) -> dict[str, str]:
    return {".".join(map(str, found.path)): found.text for found in contradictions(one)}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"weights": FULL, "recipe": "custom_diffusion"},
        {"weights": FULL, "export": {"formats": ["delta", "a1111"]}},
        {"export": {"formats": ["bundle"]}},
        {"export": {"formats": ["diffusers"]}},
        {"adapter": {"mode": "two-phase", "pivot": 0.9}},
        {"weights": {"kind": "lora", "text_encoder": True}},
        {"recipe": "dreambooth"},
    ],
)
def test_sound_recipes(sections: dict[str, Any]) -> None:
    assert said(recipe(**sections)) == {}


@pytest.mark.parametrize(
    ("sections", "key", "text"),
    [
        ({"adapter": {"pivot": 0.0}}, "adapter.pivot", "words never learn"),
        ({"adapter": {"pivot": 1.0, "mode": "two-phase"}}, "adapter.pivot", "weights never learn"),
        ({"adapter": {"mode": "two-phase"}, "train": {"steps": 1}}, "train.steps", "two phases"),
        (
            {"words": WORDS | {"progressive_steps": 60}, "train": {"steps": 100}},
            "adapter.embedding.progressive_steps",
            "words rest after 50",
        ),
        ({"weights": FULL | {"text_encoder": True}}, "adapter.weights.text_encoder", "a LoRA can train it"),
        ({"recipe": "custom_diffusion"}, "adapter.weights.kind", "must be full"),
        ({"export": {"formats": ["kohya"]}}, "export.formats", "for the words"),
        ({"export": {"formats": ["a1111"]}}, "export.formats", "bundle for the weights"),
        ({"weights": FULL, "export": {"formats": ["a1111"]}}, "export.formats", "delta, diffusers or single-file"),
        ({"export": {"formats": ["diffusers", "delta"]}}, "export.formats", "holds delta"),
        ({"weights": FULL, "export": {"formats": ["delta", "a1111", "bundle"]}}, "export.formats", "plain LoRA"),
        ({"weights": {"kind": "lora", "use_dora": True}, "export": {"formats": ["bundle"]}}, "export.formats", "plain"),
        ({"weights": {"kind": "lora", "targets": ["("]}}, "adapter.weights.targets.0", "regular expression"),
    ],
)
def test_what_cannot_be_meant_is_refused(sections: dict[str, Any], key: str, text: str) -> None:
    assert text in said(recipe(**sections))[key]


def test_a_word_with_a_dot_cannot_be_bundled_by_name() -> None:
    words = {"kind": "embedding", "tokens": [{"token": "<t.u>"}]}
    data = {"concepts": [{"folder": "pictures", "prompt": "a <t.u>", "trigger": "<t.u>"}]}
    assert said(recipe(words=words, data=data)) == {}
    assert "at the dot" in said(recipe(words=words, data=data, export={"formats": ["bundle"]}))["export.formats"]
