from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapters import attach
from finetune.config.adapters import FullConfig, LoraConfig
from finetune.config.schema import ModelConfig, Recipe
from finetune.families import load_family
from finetune.randomness import generator


@pytest.fixture
def recipe(tiny_sd: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on the tiny base whose output folder is called "zib"."""

    def make(**sections: Any) -> Recipe:
        concept = {"folder": "pictures", "prompt": "a photo of zib star", "trigger": "zib"}
        return Recipe.model_validate(
            {
                "recipe": "dreambooth",
                "output": str(tmp_path / "zib"),
                "model": {"path": str(tiny_sd)},
                "adapter": {"kind": "lora"},
                "data": {"concepts": [concept], "resolution": 16},
                **sections,
            }
        )

    return make


@pytest.fixture(scope="session")
def trained(tiny_sd: Path) -> Callable[..., tuple[Any, Any]]:
    """A family with an adapter that has learned something: every weight moved by a known draw."""

    def make(kind: str = "lora", folder: Path = tiny_sd, **settings: Any) -> tuple[Any, Any]:
        family = load_family(ModelConfig(path=str(folder)))
        config = LoraConfig(kind="lora", **settings) if kind == "lora" else FullConfig(kind="full", **settings)
        adapter = attach(config, family, seed=0)
        with torch.no_grad():
            for group in adapter.groups():
                for name, parameter in group.parameters.items():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
        return family, adapter

    return make
