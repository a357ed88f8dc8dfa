"""What can be trained, one file each, and the way from a recipe's ``adapter`` section to one of them."""

from __future__ import annotations

from importlib import import_module

import torch

from finetune.adapter import Adapter
from finetune.config.adapters import AdapterConfig
from finetune.family import ModelFamily

METHODS = {
    "lora": "lora.Lora",
    "lokr": "lycoris.Lycoris",
    "loha": "lycoris.Lycoris",
    "oft": "lycoris.Lycoris",
    "full": "full.Full",
    "embedding": "embedding.Embedding",
    "hypernetwork": "hypernetwork.Hypernetworks",
    "pivotal": "pivotal.Pivotal",
}
"""A section's ``kind`` -> the class that carries it out, called with the section, the family and the seed."""


def attach(config: AdapterConfig, family: ModelFamily, seed: int, device: torch.device | None = None) -> Adapter:
    """Load the networks that will train and make what trains in them trainable.

    Args:
        seed: of initial values, which depend on it and on each module's name alone.
        device: where networks are put that are loaded for it; the family's unless it is given.

    Raises:
        UserError: a preset or pattern matches nothing, or the method has no place in this architecture.
    """
    module, _, name = METHODS[config.kind].partition(".")
    usual = family.device
    family.device = device or usual
    try:
        found: Adapter = getattr(import_module(f"{__name__}.{module}"), name)(config, family, seed)
    finally:
        family.device = usual
    return found
