"""A family's networks without their weights: shapes are enough to count parameters and activations."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UserError
from finetune.family import ModelFamily

LIBRARIES = ("diffusers", "transformers")


def skeleton(folder: Path, component: str) -> nn.Module:
    """The network in ``folder/component`` on the meta device, made from its settings alone, frozen, in ``eval()``.

    Args:
        folder: of diffusers, with a ``model_index.json``.

    Raises:
        UserError: the folder names a class of no library that is known here; its own code is never run.
    """
    library, kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[component]
    if library not in LIBRARIES:
        raise UserError(f"{folder / 'model_index.json'}: {component} is of the library {library!r}; known: {LIBRARIES}")
    network = getattr(importlib.import_module(library), kind)
    with torch.device("meta"):
        if library == "diffusers":
            built = network.from_config(network.load_config(folder, subfolder=component, local_files_only=True))
        else:
            built = network(network.config_class.from_pretrained(folder, subfolder=component, local_files_only=True))
    bare: nn.Module = built
    return bare.eval().requires_grad_(False)


def fill(family: ModelFamily, folder: Path) -> None:
    """Put skeletons in the place of all networks of ``family``."""
    for network, component in family.components.items():
        family.networks[network] = skeleton(folder, component)


def parameters(module: nn.Module) -> int:
    """How many numbers a network holds."""
    return sum(parameter.numel() for parameter in module.parameters())


def activations(family: ModelFamily, resolution: int, batch: int, checkpointing: bool, caption: str = "") -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, counted on skeletons.

    Args:
        family: holds skeletons, with what will train attached.
        resolution: side of the pictures in pixels.
        batch: pictures in one forward pass.
        caption: of each of them.
    """
    if checkpointing and hasattr(family, "enable_gradient_checkpointing"):
        family.enable_gradient_checkpointing()
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in family.networks.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held on to, so that no later storage takes its address
        return tensor

    modes = {module: module.training for module in family.networks.modules()}
    family.networks.train()
    side = resolution // family.latent_scale
    with (
        torch.device("meta"),
        _fused_attention(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        noisy = torch.empty(batch, family.latent_channels, side, side)
        prompt = family.encode_prompt([caption] * batch)
        family.predict(noisy, torch.zeros(batch), prompt, torch.zeros(batch, 6))
    for module, training in modes.items():
        module.training = training
    return sum(storage.nbytes() for storage in kept.values())


class _Attention(torch.autograd.Function):
    """The shapes of fused attention, and what it keeps: its inputs and its output, never the L x S matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention counts as the fused kernels of real devices do; the meta device has none of them."""
    real = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real
