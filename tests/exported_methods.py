"""Files of every method, as a run leaves them, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig, Recipe
from finetune.export import export
from finetune.families import load_family
from finetune.randomness import generator

WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
LORA = {"kind": "lora", "rank": 2}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {**LORA, "text_encoder": True},
    "dora": {**LORA, "use_dora": True},
    "lokr": {"kind": "lokr", "rank": 2},
    "loha": {"kind": "loha", "rank": 2},
    "oft": {"kind": "oft", "block_size": 4},
    "full": {"kind": "full"},
    "delta": {"kind": "full", "select": "cross-kv"},
    "embedding": WORDS,
    "pivotal": {"kind": "pivotal", "embedding": WORDS, "weights": LORA},
    "hypernetwork": {"kind": "hypernetwork"},
}


def write(method: str, base: Path, folder: Path) -> Path:
    """Write ``folder/zib/adapters`` and return ``folder/zib``: every weight is moved by a known draw."""
    settings = METHODS[method]
    family = load_family(ModelConfig(path=str(base)))
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
            "model": {"path": str(base)},
            "adapter": settings,
            "data": {"concepts": [concept], "resolution": 16},
        }
    )
    for part in adapter.parts():
        export(part.weights(), family, recipe, folder / "zib" / "adapters")
    return folder / "zib"
