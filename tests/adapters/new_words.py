"""New words in small models, and what a caption with them becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import attach
from finetune.adapters.embedding import Embedding
from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ModelConfig
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)


def config(*tokens: dict[str, Any], **changes: Any) -> EmbeddingConfig:
    return EmbeddingConfig.model_validate(
        {"kind": "embedding", "tokens": list(tokens) or [{"token": "<t>", "initializer": "star"}], **changes}
    )


def attached(folder: Path, *tokens: dict[str, Any], seed: int = 0, **changes: Any) -> tuple[ModelFamily, Embedding]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(config(*tokens, **changes), family, seed)
    assert isinstance(adapter, Embedding)
    adapter.begin_step(0)
    return family, adapter


def rows(adapter: Embedding) -> nn.Parameter:
    (parameter,) = adapter.groups()[0].parameters.values()
    return parameter


def loss(family: ModelFamily, captions: list[str]) -> Tensor:
    noisy = torch.randn(len(captions), 4, 8, 8, generator=generator(0, "noisy"))
    steps = torch.full((len(captions),), 500)
    answer = family.predict(noisy, steps, family.encode_prompt(captions), GEOMETRY[: len(captions)])
    return (answer - torch.randn(answer.shape, generator=generator(0, "target"))).square().mean()


def encoded(family: ModelFamily, *captions: str) -> Tensor:
    return family.encode_prompt(captions).tokens


def spread(values: Tensor) -> float:
    return float(values.detach().std())
