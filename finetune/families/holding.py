"""How a family's networks lie in memory, as a recipe's ``model`` section says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetune.config.schema import ModelConfig
from finetune.families.block_swap import BlockSwap
from finetune.families.precision import cast_at_border, cast_inputs
from finetune.families.quantised import quantise


def pack(model: ModelConfig, network: str, module: nn.Module, blocks: Mapping[str, nn.Module]) -> nn.Module:
    """``module`` with the weights of its ``blocks`` in fewer bits, where ``model`` says so; changed in place.

    Args:
        network: as a family calls it: "denoiser", "vae", or a text encoder.
        blocks: by their names in ``module``.
    """
    if packed := model.format_of(network):
        quantise(blocks, packed.kind, packed.skip)
    return module


def arrange(
    model: ModelConfig, network: str, module: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device
) -> nn.Module:
    """``module`` with its weights where they belong, and casts where numbers go in and out; no weight changes.

    A skeleton stays on the meta device. Arguments as of ``pack``.
    """
    meta = next(module.parameters()).is_meta
    if network == "vae":
        cast_inputs(module)
        if model.vae_tiling:
            module.enable_tiling()  # type: ignore[operator]
    elif network == "denoiser":
        if model.dtype != "float32":
            cast_at_border(module)
        if model.block_swap and not meta:
            BlockSwap(list(blocks.values())[-model.block_swap :], device)
    return module if meta else module.to(device)


def changes(model: ModelConfig, network: str) -> str:
    """What of it changes a network's answers, a line; nothing where the network is as it is on disk."""
    said: dict[str, Any] = {} if model.dtype_of(network) == "float32" else {"dtype": model.dtype_of(network)}
    if packed := model.format_of(network):
        said |= packed.model_dump(exclude={"text_encoders"})
    if network == "vae" and model.vae_tiling:
        said["tiling"] = "on"
    return f"{json.dumps(said)}\n" if said else ""
