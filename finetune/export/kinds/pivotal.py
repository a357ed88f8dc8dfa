"""New words and a LoRA in one file (layout bundle). Apart, they are files of the kinds embedding and lora."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import Weights
from finetune.config.adapters import LoraConfig, PivotalConfig
from finetune.config.schema import Recipe
from finetune.export import check_bundle
from finetune.export.base import load_base
from finetune.export.bundle import PREFIX, load_bundle, pack, parts_of
from finetune.export.checks import Report
from finetune.export.kinds import Contents, wanted
from finetune.export.kinds.lycoris import write_file
from finetune.export.metadata import OWN, describe, side_file
from finetune.export.read import Identity
from finetune.family import ExportNames, ModelFamily, writable
from finetune.files import write_json

LAYOUTS = ("bundle",)


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """Each part is asked for itself, as it is exported for itself."""


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``<run>-bundle.safetensors`` with its card, where the recipe has a LoRA that can be bundled."""
    if not (names := file_names(recipe, family.export_names)):
        return []
    found, words = parts_of(weights, family.export_names)
    path = folder / names["bundle"]
    tensors = pack(found, words, family.export_names, getattr(torch, recipe.export.dtype))
    header = describe("kohya", found, json.loads(weights.settings["layers"]), family, recipe)
    write_file(path, tensors, header | {f"{OWN}kind": "pivotal", f"{OWN}layout": "bundle"})
    write_json(path.with_suffix(".json"), side_file(recipe, family))
    return [path]


def layouts(recipe: Recipe, names: Mapping[str, ExportNames]) -> tuple[str, ...]:
    """A bundle, unless the recipe asks for other files only or the family's names allow none.

    It holds no DoRA, whole weights or words with a dot.
    """
    adapter = recipe.adapter
    if not isinstance(adapter, PivotalConfig) or not isinstance(adapter.weights, LoraConfig):
        return ()
    if adapter.weights.use_dora or any("." in token.token for token in adapter.embedding.tokens):
        return ()
    return wanted(recipe, "pivotal", writable(LAYOUTS, names))


def file_names(recipe: Recipe, names: Mapping[str, ExportNames]) -> dict[str, str]:
    """What the file of a recipe is called, by layout, for a family of these names."""
    return {layout: f"{Path(recipe.output).absolute().name}-bundle.safetensors" for layout in layouts(recipe, names)}


def recognise(contents: Contents) -> str | None:
    """By the words' keys."""
    return "bundle" if any(key.startswith(PREFIX) for key in contents.keys) else None


def readers(layout: str) -> tuple[str, ...]:
    """A1111 alone takes both; ``finetune sample`` takes it apart for diffusers."""
    return check_bundle.READERS


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_bundle``."""
    check_bundle.check_file(report, found, load_base(found, base), against, weights)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through diffusers' loaders, one for the words and one for the LoRA."""
    load_bundle(pipeline, found.path, strength)
