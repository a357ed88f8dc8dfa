"""From trained weights to files that other tools read, and the proof that they do."""

from __future__ import annotations

from pathlib import Path

from finetune.adapter import Weights
from finetune.config.schema import Recipe
from finetune.export.checks import Check, Verification
from finetune.export.kinds import kind
from finetune.export.layers import layers, weights_of
from finetune.export.read import FORMATS, Identity, identify, pieces, read
from finetune.export.verify import verify
from finetune.family import ModelFamily
from finetune.files import remove_partial

__all__ = [
    "FORMATS",
    "Check",
    "Identity",
    "Verification",
    "export",
    "identify",
    "layers",
    "pieces",
    "read",
    "verify",
    "weights_of",
]


def export(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """Write an adapter in the layouts that the recipe names, each file whole or not at all.

    ``finetune.export.kinds`` has a module for each kind. In ``folder`` of a LoRA:
    ``pytorch_lora_weights.safetensors`` (layout diffusers; the name that
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
    written_by = kind(weights.kind)
    written_by.require_learned(weights, recipe)
    return written_by.write(weights, family, recipe, folder)
