from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import Recipe
from finetune.export import export, layers
from finetune.export.layers import Layer
from finetune.export.read import read_header
from finetune.families import sdxl
from finetune.randomness import generator

SETTINGS = {"rank": 4, "alpha": 2.0, "targets": "attention", "text_encoder": True}
Files = tuple[list[Layer], Path, Path]


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random SDXL; for reading only."""
    return sdxl.tiny(tmp_path_factory.mktemp("tiny-sdxl") / "model")


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tiny_sd: Path, tiny_sdxl: Path) -> Path:
    return tiny_sd if request.param == "sd" else tiny_sdxl


@pytest.fixture(scope="session")
def files(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """A LoRA of a model: its layers, its file for diffusers and the one for kohya's tools; for reading only."""
    made: dict[str, Files] = {}

    def make(model: Path, dtype: str = "float32", **settings: Any) -> Files:
        asked = {**SETTINGS, **settings}
        key = f"{model} {dtype} {asked}"
        if key not in made:
            family, adapter = trained(folder=model, **asked)
            folder = tmp_path_factory.mktemp("run")
            concept = {"folder": "pictures", "prompt": "a photo of zib star", "trigger": "zib"}
            recipe = Recipe.model_validate(
                {
                    "recipe": "dreambooth",
                    "output": str(folder / "zib"),
                    "model": {"path": str(model)},
                    "adapter": {"kind": "lora", **asked},
                    "data": {"concepts": [concept], "resolution": 16},
                    "export": {"dtype": dtype},
                }
            )
            paths = export(adapter.weights(), family, recipe, folder)
            made[key] = layers(adapter.weights()), paths[0], paths[-1]
        return made[key]

    return make


@pytest.fixture
def other(files: Any, tmp_path: Path) -> Callable[..., Path]:
    """Another LoRA of a model in diffusers' layout: every number is moved by a draw of its own."""

    def make(model: Path, seed: int, **settings: Any) -> Path:
        _, path, _ = files(model, **settings)
        tensors = load_file(path)
        for key, tensor in tensors.items():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator(seed, key))
        made = tmp_path / f"other-{seed}.safetensors"
        save_file(tensors, made, read_header(path)[1])
        return made

    return make
