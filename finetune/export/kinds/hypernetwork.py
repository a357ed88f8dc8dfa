"""Hypernetworks: a safetensors file of our own (layout diffusers) and A1111's ``.pt``, which ComfyUI reads as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune import __version__
from finetune.adapter import Weights
from finetune.config.adapters import HypernetworkConfig
from finetune.config.schema import Recipe
from finetune.errors import GuardError
from finetune.export import check_hypernetwork
from finetune.export.checks import Report
from finetune.export.hypernetwork import CONFIG, INITS, Stored, load_hypernetwork
from finetune.export.hypernetwork import read as read_file
from finetune.export.hypernetwork import write as write_file
from finetune.export.kinds import Contents, wanted
from finetune.export.layers import check as check_tensors
from finetune.export.metadata import describe
from finetune.export.read import Identity
from finetune.family import ModelFamily
from finetune.hypernet import Structure, initialise

LAYOUTS = ("diffusers", "a1111")
NETWORK = "hypernetwork."


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """The start is a function of the recipe, so it can be made again and compared."""
    config = recipe.adapter
    if not isinstance(config, HypernetworkConfig):
        return
    start = stored(weights, {}).network()
    initialise(start, config.init, recipe.seed, config.zero_last)
    if all(torch.equal(tensor, weights.tensors[f"{NETWORK}{name}"]) for name, tensor in start.state_dict().items()):
        raise GuardError("nothing was learned: every weight of the hypernetwork is where it began")


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``<run>.safetensors``, which keeps dropout and settings as they were trained, and ``<run>.pt`` for web UIs.

    Raises:
        GuardError: the weights are not finite.
    """
    check_tensors(weights.tensors)
    dtype = getattr(torch, recipe.export.dtype)
    one = stored(weights, _facts(weights, recipe), dtype)
    paths = {layout: folder / name for layout, name in file_names(recipe).items()}
    for layout, path in paths.items():
        write_file(path, one, _header(layout, one, weights, family, recipe))
        check_hypernetwork.require_same(path, one)
    return list(paths.values())


def file_names(recipe: Recipe) -> dict[str, str]:
    """What the files of a recipe are called, by layout."""
    run = Path(recipe.output).absolute().name
    names = {"diffusers": f"{run}.safetensors", "a1111": f"{run}.pt"}
    return {layout: names[layout] for layout in wanted(recipe, "hypernetwork", LAYOUTS)}


def recognise(contents: Contents) -> str | None:
    """By the header; a pickle by its keys, which are widths."""
    if contents.path.suffix == ".safetensors":
        return "diffusers" if CONFIG in contents.metadata else None
    return "a1111" if any(key.isdigit() for key in contents.keys) else None


def readers(layout: str) -> tuple[str, ...]:
    """Diffusers through ``finetune.load_hypernetwork``; A1111 reads the ``.pt``, and ComfyUI most of them."""
    return check_hypernetwork.READERS[layout]


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_hypernetwork``."""
    expected = stored(weights, {}) if weights is not None else None
    check_hypernetwork.check_file(report, found, base, against, expected)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through ``finetune.load_hypernetwork``."""
    load_hypernetwork(pipeline, found.path, strength)


def stored(weights: Weights, facts: dict[str, Any], dtype: torch.dtype = torch.float32) -> Stored:
    """Trained weights as files hold them."""
    tensors = {name.removeprefix(NETWORK): tensor.to(dtype) for name, tensor in weights.tensors.items()}
    return Stored(Structure.of(weights.settings), tensors, facts)


def read_weights(found: Identity) -> Weights:
    """The reverse of ``stored``, of a file."""
    one = read_file(found.path)
    named = {known: init for init, known in INITS.items()}
    settings = one.structure.as_text() | {"init": named.get(one.settings()["weight_initialization"], "normal")}
    return Weights("hypernetwork", {f"{NETWORK}{name}": tensor for name, tensor in one.tensors.items()}, settings)


def _facts(weights: Weights, recipe: Recipe) -> dict[str, Any]:
    return {
        "step": recipe.train.total_steps,
        "name": Path(recipe.output).absolute().name,
        "weight_initialization": INITS[weights.settings["init"]],
        "sd_checkpoint": None,
        "sd_checkpoint_name": recipe.model.path,
        "optional_info": f"finetune {__version__}",
    }


def _header(layout: str, one: Stored, weights: Weights, family: ModelFamily, recipe: Recipe) -> dict[str, str]:
    header = describe(layout, (), weights.settings, family, recipe)
    architecture = header["modelspec.architecture"].removesuffix("/lora") + "/hypernetwork"
    return header | {
        "finetune.kind": "hypernetwork",
        "finetune.layers": str(len(one.tensors)),
        "modelspec.architecture": architecture,
    }
