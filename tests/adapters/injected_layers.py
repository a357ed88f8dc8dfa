"""What tests of adapters of single layers have in common: a tiny model asked one fixed question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from finetune.adapters import attach
from finetune.batch import Conditioning
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)


def attached(folder: Path, seed: int = 0, **settings: Any) -> tuple[ModelFamily, Any]:
    """A fresh family with what the settings of an ``adapter`` section say."""
    family = load_family(ModelConfig(path=str(folder)))
    config = TypeAdapter(AdapterConfig).validate_python(settings)
    return family, attach(config, family, seed)


def noisy() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=generator(0, "noisy"))


def answer(family: ModelFamily) -> Tensor:
    """What the denoiser makes of fixed inputs."""
    tokens = torch.randn(2, 24, 16, generator=generator(0, "tokens"))
    return family.predict(noisy(), torch.tensor([10, 700]), Conditioning(tokens=tokens), GEOMETRY)


def base_answer(folder: Path) -> Tensor:
    """The same of the untouched model."""
    family = load_family(ModelConfig(path=str(folder)))
    family.require("denoiser")
    return answer(family).detach()


def move(adapter: Any, std: float = 0.1) -> None:
    """As after training: every value is off its start, by a draw named after it."""
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter += std * torch.randn(parameter.shape, generator=generator(1, name))


def train(family: ModelFamily, adapter: Any, steps: int, rate: float = 1e-2) -> list[float]:
    """Steps of AdamW towards a fixed answer, through prompts that the text encoder makes; the losses."""
    wanted = torch.randn(2, 4, 8, 8, generator=generator(0, "wanted"))
    groups = [{"params": list(g.parameters.values()), "lr": rate * g.factor} for g in adapter.groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    family.require("text_encoder")
    losses = []
    for step in range(steps):
        adapter.begin_step(step)
        prompt = family.encode_prompt(["a red star", "a photo"])
        loss = (family.predict(noisy(), torch.tensor([10, 700]), prompt, GEOMETRY) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        adapter.end_step({group.name: rate for group in adapter.groups()})
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
