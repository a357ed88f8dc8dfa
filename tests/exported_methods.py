"""Files of every method, as a run leaves them, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from finetune.adapter import Weights
from finetune.adapters import attach
from finetune.aesthetic import Aesthetic, mean_embedding
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig, Recipe
from finetune.export import export
from finetune.export.aesthetic import weights_of
from finetune.families import load_family
from finetune.families.tiny import write_tiny_clip
from finetune.family import ModelFamily
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
    "aesthetic": {},  # takes no steps: its settings name a CLIP, which ``write`` makes
}


def write(method: str, base: Path, folder: Path) -> Path:
    """Write ``folder/zib/adapters`` and return ``folder/zib``: every weight is moved by a known draw."""
    family = load_family(ModelConfig(path=str(base)))
    settings = METHODS.get(method) or {"kind": "aesthetic", "clip": str(write_tiny_clip(folder / "clip", base))}
    concept = {"folder": "pictures", "prompt": "a photo of <zib> star", "trigger": "<zib>"}
    recipe = Recipe.model_validate(
        {
            "recipe": "aesthetic" if method == "aesthetic" else "lora",
            "output": str(folder / "zib"),
            "model": {"path": str(base)},
            "adapter": settings,
            "data": {"concepts": [concept], "resolution": 16},
            "report": {"prompts": ["a photo of <zib> star"]},
        }
    )
    for weights in _aesthetic(family, settings["clip"]) if method == "aesthetic" else _moved(family, settings):
        export(weights, family, recipe, folder / "zib" / "adapters")
    return folder / "zib"


def _moved(family: ModelFamily, settings: Mapping[str, Any]) -> list[Weights]:
    adapter: Any = attach(TypeAdapter(AdapterConfig).validate_python(settings), family, seed=0)
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
    return [part.weights() for part in adapter.parts()]


def _aesthetic(family: ModelFamily, clip: str) -> list[Weights]:
    space = family.sites.shared_space(clip)
    vectors = torch.randn(5, space.projection.shape[0], generator=generator(1, "vectors"))
    aesthetic = Aesthetic(mean_embedding(vectors), space.projection, 3, 1e-2, 0.8)
    return [weights_of(aesthetic, clip, space.encoder, len(vectors))]
