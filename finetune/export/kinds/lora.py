"""LoRA: files of the layouts diffusers and kohya.

DoRA has one row length per output, for which the tools that read kohya's naming have no right formula. It is written
for diffusers; where a recipe asks for kohya by name, each layer's whole difference is written (layout difference),
which is exact at every strength between the base and what was trained, and as large as the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.config.adapters import LoraConfig, PivotalConfig
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.export import check_lora, check_lycoris, lycoris_kohya
from finetune.export.base import load_base
from finetune.export.checks import Report
from finetune.export.kinds import Contents, asked, wanted
from finetune.export.kinds.lycoris import ADAPTER, write_file
from finetune.export.layers import Layer, check_learned, layers
from finetune.export.lycoris import Change, differences
from finetune.export.merge import merge
from finetune.export.metadata import describe, side_file
from finetune.export.read import CONVENTIONAL, FORMATS, Identity, read_tensors
from finetune.family import ExportNames, ModelFamily, writable
from finetune.files import write_json

LAYOUTS = (*FORMATS, "difference")


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """``lora_B`` is zero at first."""
    check_learned(layers(weights))


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``pytorch_lora_weights.safetensors`` for diffusers, and ``<run>.safetensors`` with its card for other tools."""
    found = layers(weights)
    return [_write(name, found, weights, family, recipe, folder) for name in layouts(recipe, family.export_names)]


def layouts(recipe: Recipe, names: Mapping[str, ExportNames]) -> tuple[str, ...]:
    """The layouts that a recipe's LoRA is written in, for a family of these names."""
    adapter = recipe.adapter.weights if isinstance(recipe.adapter, PivotalConfig) else recipe.adapter
    dora = isinstance(adapter, LoraConfig) and adapter.use_dora
    method = "dora" if dora else "lora"
    found = wanted(recipe, method, writable(tuple(FORMATS), names))
    if not dora:
        return found
    others = ("difference",) if asked(recipe, method) and "kohya" in found else ()
    return (*(name for name in found if name != "kohya"), *others)


def recognise(contents: Contents) -> str | None:
    """By the endings of the keys."""
    if lycoris_kohya.algorithm_of(contents.keys) == "full":
        return "difference"
    return next((layout.name for layout in FORMATS.values() if layout.recognises(contents.keys)), None)


def readers(layout: str) -> tuple[str, ...]:
    """As the layout says."""
    return FORMATS[layout].readers if layout in FORMATS else check_lycoris.READERS[layout]


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_lora``."""
    family = load_base(found, base)
    if found.layout != "difference":
        check_lora.check_file(report, found, family, against, weights)
        return

    def expected(dtype: torch.dtype) -> tuple[list[Change], dict[str, Tensor]]:
        assert weights is not None
        trained = differences(layers(weights), family)
        return trained, lycoris_kohya.pack(trained, family.export_names, dtype)

    check_lycoris.check_file(report, found, family, against, expected if weights else None, apply)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through ``load_lora_weights``; differences are added to the weights."""
    if found.layout == "difference":
        merge(pipeline, read_tensors(found.path), strength)
        return
    try:
        pipeline.load_lora_weights(str(found.path), adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"{found.path} does not fit the base: {str(error).splitlines()[0]}") from error
    if not any(ADAPTER in held for held in pipeline.get_list_adapters().values()):
        raise UserError(f"{found.path}: diffusers knows none of its layers in {type(pipeline).__name__}")
    if strength != 1.0:
        rescale(pipeline, strength)


def rescale(pipeline: Any, strength: float) -> None:
    """Let the LoRA of ``apply`` count as much; at 0 the model is what it was before, DoRA's lengths too."""
    if strength == 0.0:
        pipeline.disable_lora()
        return
    pipeline.enable_lora()
    pipeline.set_adapters([ADAPTER], [strength])


def file_names(recipe: Recipe, names: Mapping[str, ExportNames]) -> dict[str, str]:
    """What the files of a recipe are called, by layout, for a family of these names."""
    return {layout: file_name(layout, recipe) for layout in layouts(recipe, names)}


def file_name(layout: str, recipe: Recipe) -> str:
    """What a LoRA file of ``layout`` is called."""
    run = Path(recipe.output).absolute().name
    return CONVENTIONAL if layout == "diffusers" else f"{run}.safetensors"


def _write(
    layout: str, found: list[Layer], weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path
) -> Path:
    path, names, dtype = folder / file_name(layout, recipe), family.export_names, getattr(torch, recipe.export.dtype)
    if layout == "difference":
        tensors, written = lycoris_kohya.pack(differences(found, family), names, dtype), found
    else:
        tensors = FORMATS[layout].pack(found, names, dtype)
        written = FORMATS[layout].unpack(tensors, names)
    write_file(path, tensors, describe(layout, written, weights.settings, family, recipe))
    if layout != "diffusers":
        write_json(path.with_suffix(".json"), side_file(recipe, family))
    return path
