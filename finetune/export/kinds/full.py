"""Whole weights: whole models as diffusers folders or single files, and the trained weights alone (layout delta)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapter import Weights
from finetune.config.adapters import FullConfig, PivotalConfig
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.export import check_delta, check_model, check_single_file
from finetune.export.base import load_base
from finetune.export.checks import Report
from finetune.export.delta import DELTA, load_delta, write_delta
from finetune.export.full import write_model
from finetune.export.kinds import Contents, asked
from finetune.export.metadata import OWN, describe
from finetune.export.read import DELTA_FILE, MODEL, SINGLE, Identity
from finetune.export.single_file import required_layout, write_single_file
from finetune.families.single_file.layouts import DENOISER
from finetune.family import ModelFamily

LAYOUTS = (MODEL, SINGLE, DELTA)
_FORMATS = {"diffusers": MODEL, SINGLE: SINGLE, DELTA: DELTA}  # what a recipe calls them
_KEYS = (DENOISER, ("first_stage_model.", "vae."))


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """Only the base can tell: ``write`` compares with it."""


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``model/``, the base's folder with the trained weights put in, or ``<run>.safetensors``, the same in one file;
    ``delta.safetensors``, the trained weights alone.
    """
    from finetune.families import model_folder

    dtype, base, names = getattr(torch, recipe.export.dtype), model_folder(recipe.model), family.export_names
    written = []
    for layout, name in file_names(recipe).items():
        path = folder / name
        if layout == MODEL:
            scheduler = family.scheduler() if family.sampling else None
            written.append(write_model(weights, base, path, names, dtype, scheduler))
            continue
        header = _header(layout, weights, family, recipe)
        if layout == SINGLE:
            spec = {"architecture": _architecture(family), "implementation": required_layout(base).code}
            header |= {f"modelspec.{key}": value for key, value in spec.items()}
            settings = family.scheduler().config
            written.append(write_single_file(weights, base, path, names, dtype, header, settings))
        else:
            written.append(write_delta(weights, base, path, names, dtype, header))
    return written


@torch.no_grad()
def put(networks: nn.ModuleDict, weights: Weights, recipe: Recipe) -> None:
    """Let ``networks`` be what is loaded again from the files of ``write``, without writing them.

    In a whole model all weights have ``export.dtype`` and are rounded by it, in a delta those that were trained.
    """
    dtype = getattr(torch, recipe.export.dtype)
    for network, module in networks.items():
        for name, held in module.state_dict(keep_vars=True).items():
            trained = weights.tensors.get(f"{network}.{name}")
            if trained is None and layouts(recipe)[0] == DELTA:
                continue
            if held.is_floating_point():
                held.data = (held if trained is None else trained).to(dtype).to(held)


def layouts(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe's weights are written as. Unless it says so, a selection does not cost a whole model's size."""
    adapter = recipe.adapter.weights if isinstance(recipe.adapter, PivotalConfig) else recipe.adapter
    selected = isinstance(adapter, FullConfig) and adapter.select != "all"
    formats = asked(recipe, "selection" if selected else "full")
    if formats is not None:
        return tuple(layout for name, layout in _FORMATS.items() if name in formats)
    return (DELTA,) if selected else (MODEL,)


def file_names(recipe: Recipe) -> dict[str, str]:
    """What the folder and the file of a recipe are called, by layout."""
    names = {MODEL: MODEL, SINGLE: f"{Path(recipe.output).absolute().name}.safetensors", DELTA: DELTA_FILE}
    return {layout: names[layout] for layout in layouts(recipe)}


def recognise(contents: Contents) -> str | None:
    """Single files by their keys, deltas by their header."""
    said = contents.metadata
    if all(any(key.startswith(begin) for key in contents.keys) for begin in _KEYS):
        return SINGLE
    return DELTA if (said.get(f"{OWN}kind"), said.get(f"{OWN}layout")) == ("full", DELTA) else None


def readers(layout: str) -> tuple[str, ...]:
    """Diffusers alone; deltas through ``finetune.load_delta``, and other tools as well where it is one file."""
    return ("diffusers", "comfyui", "forge") if layout == SINGLE else ("diffusers",)


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_model``, ``check_single_file`` and ``check_delta``."""
    if found.layout == SINGLE:
        check_single_file.check_file(report, found.path, base, weights)
    elif found.whole:
        check_model.check_folder(report, found.path, weights)
    else:
        check_delta.check_file(report, found, load_base(found, base), against, weights)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """A delta through ``finetune.load_delta``; nothing to do for a whole model, which the pipeline was loaded from.

    Raises:
        UserError: another strength than 1 is asked for of a whole model, or a delta does not fit.
    """
    if not found.whole:
        load_delta(pipeline, found.path, strength)
    elif strength != 1.0:
        raise UserError(f"{found.path} is a whole model; strength {strength:g} is for adapter files")


def _header(layout: str, weights: Weights, family: ModelFamily, recipe: Recipe) -> dict[str, str]:
    header = describe(layout, (), weights.settings, family, recipe)
    architecture = header["modelspec.architecture"].removesuffix("/lora") + "/delta"
    count = str(len(weights.tensors))
    return header | {f"{OWN}kind": "full", f"{OWN}layers": count, "modelspec.architecture": architecture}


def _architecture(family: ModelFamily) -> str:
    """ModelSpec's name for what a whole model is; it tells the two kinds of SD 2 apart."""
    name = family.published.architecture
    if name != "stable-diffusion-v2":
        return name
    return f"{name}-768-v" if family.objective.prediction == "v_prediction" else f"{name}-512"
