"""What a recipe for a hypernetwork may not say, and learning rates step by step."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.checks import contradictions
from finetune.config.schema import Recipe, TrainConfig
from finetune.config.summary import summary


def said(train: dict[str, Any] | None = None, **adapter: Any) -> dict[str, str]:
    recipe = Recipe.model_validate(
        {
            "recipe": "hypernetwork",
            "output": "runs/fep",
            "adapter": {"kind": "hypernetwork", **adapter},
            "data": {"concepts": [{"folder": "pictures", "prompt": "a star"}]},
            "train": train or {},
        }
    )
    return {".".join(map(str, found.path)): found.text for found in contradictions(recipe)}


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"sizes": [768, 320, 640, 1280], "layers": [1, 2, 4, 2, 1], "dropout": [0, 0.05, 0.1, 0, 0]},
        {"activation": "swish", "layer_norm": True, "activate_output": True, "zero_last": True},
        {"activation": "linear", "activate_output": True, "zero_last": True},
        {"activation": "leakyrelu", "init": "kaiming_normal", "layers": [1, 0.5, 1]},
    ],
)
def test_all_of_a1111_can_be_said(adapter: dict[str, Any]) -> None:
    """METHODS §4.2."""
    assert said(**adapter) == {}


@pytest.mark.parametrize(
    ("adapter", "key", "text"),
    [
        ({"layers": [2, 1]}, "adapter.layers", "begin and end with 1"),
        ({"layers": [1, 2]}, "adapter.layers", "begin and end with 1"),
        ({"dropout": [0, 0]}, "adapter.dropout", "layers, which has 3"),
        ({"dropout": [0, 0.3, 0.3]}, "adapter.dropout", "first and the last 0"),
        ({"sizes": [320, 320]}, "adapter.sizes", "each width once"),
        ({"zero_last": True, "activation": "relu", "activate_output": True}, "adapter.zero_last", "gradient"),
    ],
)
def test_networks_that_cannot_be(adapter: dict[str, Any], key: str, text: str) -> None:
    found = said(**adapter)
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize(
    ("schedule", "key", "text"),
    [
        ({"rates": "often"}, "train.schedule.rates", "'often' is none"),
        ({"rates": "1e-5:100", "name": "cosine"}, "train.schedule.name", "must be constant"),
        ({"rates": "1e-5:100", "warmup_steps": 5}, "train.schedule.warmup_steps", "must be 0"),
    ],
)
def test_rates_that_contradict(schedule: dict[str, Any], key: str, text: str) -> None:
    """METHODS §4.3: invalid text is one clear error."""
    found = said({"schedule": schedule})
    assert list(found) == [key]
    assert text in found[key]


def test_rates_say_how_long_and_how_fast() -> None:
    train = TrainConfig.model_validate({"steps": 500, "schedule": {"rates": "1e-5:100, 3e-5:200"}})
    assert (train.total_steps, train.peak_learning_rate) == (200, 3e-5)
    assert TrainConfig(steps=500).total_steps == 500
    assert TrainConfig(learning_rate=3e-4).peak_learning_rate == 3e-4


def test_the_summary_names_the_end_of_the_rates() -> None:
    recipe = Recipe.model_validate(
        {
            "recipe": "hypernetwork",
            "output": "runs/fep",
            "adapter": {"kind": "hypernetwork"},
            "data": {"concepts": [{"folder": "tinyworld:style/3"}]},
            "train": {"schedule": {"rates": "1e-5:77"}},
        }
    )
    assert "a hypernetwork of [1, 2, 1] linear" in summary(recipe)
    assert "77 steps" in summary(recipe)
