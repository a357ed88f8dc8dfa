"""The way from a recipe's ``adapter`` section to what trains."""

from __future__ import annotations

import torch

from finetune.adapters import attach
from finetune.config.adapters import LoraConfig
from finetune.family import ModelFamily


def test_networks_that_train_can_wait_elsewhere_than_others(tiny_family: ModelFamily) -> None:
    """Under FSDP2 they wait on the host to be dealt out, whereas what encodes pictures belongs onto the device."""
    tiny_family.device = torch.device("meta")
    attach(LoraConfig(kind="lora", rank=2), tiny_family, 0, torch.device("cpu"))
    assert {one.device.type for one in tiny_family.networks["denoiser"].parameters()} == {"cpu"}
    tiny_family.require("vae")
    assert {one.device.type for one in tiny_family.networks["vae"].parameters()} == {"meta"}
