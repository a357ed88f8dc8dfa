"""A family's networks without their weights: shapes are enough to count parameters and memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import nn

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


def fill(family: ModelFamily, folder: Path) -> dict[str, int]:
    """Put skeletons, held as ``family.model`` says, in the place of all networks; returns how many parameters each has.

    What blocks are swapped is left to the estimate: a skeleton lies nowhere.
    """
    counts = {}
    for network, component in family.components.items():
        bare = skeleton(folder, component)
        counts[network] = parameters(bare)
        nn.Module.to(bare, getattr(torch, family.model.dtype_of(network)))  # diffusers' own warns of what it keeps
        family.networks[network] = family.hold(network, bare)
    return counts


def parameters(module: nn.Module) -> int:
    """How many numbers a network holds."""
    return sum(parameter.numel() for parameter in module.parameters())
