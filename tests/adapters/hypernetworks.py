"""Hypernetworks in small models, and a question to ask of these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from finetune.adapters import attach as attach_adapter
from finetune.adapters.hypernetwork import Hypernetworks
from finetune.batch import Conditioning
from finetune.config.adapters import HypernetworkConfig
from finetune.config.schema import ModelConfig
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.hypernet import Hypernetwork, Structure, initialise
from finetune.randomness import generator

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)
WIDTH, CONTEXT = 16, 24


def config(**changes: object) -> HypernetworkConfig:
    return HypernetworkConfig.model_validate({"kind": "hypernetwork", **changes})


def attached(folder: Path, seed: int = 0, **changes: object) -> tuple[ModelFamily, Hypernetworks]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach_adapter(config(**changes), family, seed)
    assert isinstance(adapter, Hypernetworks)
    return family, adapter


def question() -> tuple[Tensor, Tensor]:
    rng = generator(0, "question")
    return torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 16, generator=rng)


def answer(family: ModelFamily) -> Tensor:
    noisy, tokens = question()
    return family.predict(noisy, torch.tensor([10, 700]), Conditioning(tokens=tokens), GEOMETRY)


def ask(unet: UNet2DConditionModel) -> Tensor:
    rng = generator(0, "ask")
    noisy, tokens = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, CONTEXT, generator=rng)
    return unet(noisy, torch.tensor([10, 700]), encoder_hidden_states=tokens).sample


def trained(sizes: list[int], seed: int = 0, structure: Structure | None = None) -> Hypernetwork:
    """As after training: far from the start."""
    network = initialise(Hypernetwork(structure or Structure(), sizes), "xavier_normal", seed)
    return network.eval()


@contextmanager
def read_by(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What each key and value layer was given by attention, and what its hooks made of it."""
    pairs: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    before = module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]), prepend=True)
    after = module.register_forward_pre_hook(lambda _, inputs: pairs.append((given[-1], inputs[0])))
    yield pairs
    before.remove()
    after.remove()


NORM, DROP, SWISH, RELU, LINEAR = nn.LayerNorm, nn.Dropout, nn.Hardswish, nn.ReLU, nn.Linear


def hooked(unet: nn.Module) -> dict[str, int]:
    return {
        name: len(part._forward_pre_hooks) for name, part in unet.named_modules() if part._forward_pre_hooks and name
    }
