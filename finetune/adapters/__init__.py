"""What can be trained, one file each, and the way from a recipe's ``adapter`` section to one of them."""

from __future__ import annotations

from finetune.adapter import Adapter
from finetune.adapters.full import Full
from finetune.adapters.lora import Lora
from finetune.config.schema import AdapterConfig, LoraConfig
from finetune.family import ModelFamily


def attach(config: AdapterConfig, family: ModelFamily, seed: int) -> Adapter:
    """Load the networks that will train and make what trains in them trainable.

    Args:
        seed: of initial values, which depend on it and on each module's name alone.

    Raises:
        UserError: a preset or pattern matches nothing.
    """
    return Lora(config, family, seed) if isinstance(config, LoraConfig) else Full(config, family)
