"""Adapters of every kind, as a run leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_methods import METHODS
from pydantic import TypeAdapter

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig, Recipe
from finetune.export import export
from finetune.families import load_family
from finetune.randomness import generator


@pytest.fixture(scope="session")
def exported(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's files: every weight moved by a known draw."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            settings = METHODS[method]
            family = load_family(ModelConfig(path=str(tiny_sd)))
            adapter: Any = attach(TypeAdapter(AdapterConfig).validate_python(settings), family, seed=0)
            with torch.no_grad():
                for group in adapter.groups():
                    for name, parameter in group.parameters.items():
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
            concept = {"folder": "pictures", "prompt": "a photo of <zib> star", "trigger": "<zib>"}
            recipe = Recipe.model_validate(
                {
                    "recipe": "lora",
                    "output": str(folder / "zib"),
                    "model": {"path": str(tiny_sd)},
                    "adapter": settings,
                    "data": {"concepts": [concept], "resolution": 16},
                }
            )
            for part in adapter.parts():
                export(part.weights(), family, recipe, folder / "zib" / "adapters")
            made[method] = folder / "zib"
        return made[method]

    return make
