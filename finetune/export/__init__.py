"""From trained weights to files that other tools read, and the proof that they do."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.adapter import Weights
from finetune.config.schema import Recipe
from finetune.errors import GuardError
from finetune.export.checks import Check, Verification
from finetune.export.full import write_model
from finetune.export.layers import Layer, layers, weights_of
from finetune.export.metadata import describe, prompt_width, side_file
from finetune.export.read import CONVENTIONAL, FORMATS, MODEL, Format, Identity, identify, read, read_tensors
from finetune.export.verify import verify
from finetune.family import ModelFamily
from finetune.files import remove_partial, write_json, write_tensors

__all__ = [
    "FORMATS",
    "Check",
    "Identity",
    "Verification",
    "export",
    "identify",
    "layers",
    "read",
    "verify",
    "weights_of",
]


def export(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """Write an adapter in the layouts that the recipe names, each file whole or not at all.

    In ``folder`` of a LoRA: ``pytorch_lora_weights.safetensors`` (layout diffusers; the name that
    ``load_lora_weights(folder)`` looks for), ``<run>.safetensors`` (layout kohya; A1111 calls a LoRA by its file
    name) and, beside it, ``<run>.json`` with the words that call what was learned. Of a whole model: ``model/``, a
    diffusers folder. ``<run>`` is the name of the recipe's output folder.

    Every file is read back and compared bit by bit. ``verify`` goes further and loads it as other tools do.

    Args:
        weights: gathered, on the CPU.
        family: that they were trained on.
        folder: belongs to the run; what an interrupted export left there is removed.

    Returns:
        The files and folders that hold weights.

    Raises:
        GuardError: the weights are empty, not finite, incomplete or never moved, or a file reads back differently.
    """
    remove_partial(folder)
    dtype = getattr(torch, recipe.export.dtype)
    if weights.kind == "full":
        from finetune.families import model_folder

        return [write_model(weights, model_folder(recipe.model), folder / MODEL, family.export_names, dtype)]
    found = layers(weights)
    return [_write(FORMATS[name], found, weights, family, recipe, folder) for name in recipe.export.formats]


def file_name(layout: str, recipe: Recipe) -> str:
    """What a LoRA file of ``layout`` is called."""
    run = Path(recipe.output).absolute().name
    return CONVENTIONAL if layout == "diffusers" else f"{run}.safetensors"


def _write(
    layout: Format, found: list[Layer], weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path
) -> Path:
    path = folder / file_name(layout.name, recipe)
    tensors = layout.pack(found, family.export_names, getattr(torch, recipe.export.dtype))
    written = layout.unpack(tensors, family.export_names)
    metadata = describe(layout.name, written, weights.settings, family, recipe)
    write_tensors(path, tensors, metadata)
    back = read_tensors(path)
    if back.keys() != tensors.keys() or not all(torch.equal(back[key], tensors[key]) for key in tensors):
        raise GuardError(f"{path}: reads back differently from what was written")
    if layout.name == "kohya":
        write_json(path.with_suffix(".json"), side_file(recipe, prompt_width(found, family)))
    return path
