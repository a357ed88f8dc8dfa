"""Aesthetic embeddings: a safetensors file of our own (layout diffusers) and A1111's ``.pt``."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import __version__
from finetune.adapter import Weights
from finetune.config.schema import Recipe
from finetune.errors import GuardError, UserError
from finetune.export.aesthetic import EMBEDDING, HEADER, load_aesthetic, read, require_encoder, said
from finetune.export.base import load_base
from finetune.export.checks import Report, quiet
from finetune.export.kinds import Contents, wanted
from finetune.export.metadata import OWN, base_of, locked
from finetune.export.pickles import write_pickle
from finetune.export.read import Identity, identify, read_pickle
from finetune.families.clip import encoder_digest
from finetune.family import ModelFamily
from finetune.files import write_tensors

LAYOUTS = ("diffusers", "a1111")
DEFAULT_WEIGHT = 0.9  # of a file that does not say it, as in A1111


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """Nothing is: it is the mean of pictures."""


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``<run>.safetensors`` with the projection and a header that says all, ``<run>.pt`` with the bare embedding.

    Both are float32 whatever ``export.dtype`` is: the extension fails on other numbers.
    """
    paths = {layout: folder / name for layout, name in file_names(recipe).items()}
    if "diffusers" in paths:
        write_tensors(paths["diffusers"], weights.tensors, _header(weights, family, recipe))
    if "a1111" in paths:
        write_pickle(paths["a1111"], weights.tensors[EMBEDDING].float().contiguous().clone())
    for path in paths.values():
        if not torch.equal(read(identify(path))[EMBEDDING], weights.tensors[EMBEDDING]):
            raise GuardError(f"{path}: reads back differently from what was written")
    return list(paths.values())


def file_names(recipe: Recipe) -> dict[str, str]:
    """What the files of a recipe are called, by layout."""
    run = Path(recipe.output).absolute().name
    names = {"diffusers": f"{run}.safetensors", "a1111": f"{run}.pt"}
    return {layout: names[layout] for layout in wanted(recipe, "aesthetic", LAYOUTS)}


def recognise(contents: Contents) -> str | None:
    """By the embedding's key, or as a pickle of nothing but a tensor."""
    if contents.path.suffix == ".safetensors":
        return "diffusers" if EMBEDDING in contents.keys else None
    return "a1111" if contents.keys == [""] else None


def readers(layout: str) -> tuple[str, ...]:
    """Diffusers through ``finetune.load_aesthetic``; ComfyUI and Forge read neither."""
    return (layout,)


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """Finite, as in memory, for the base's text encoder, and a prompt that really moves."""
    tensors = report.run("finite", lambda: read(found), lambda read: f"{list(read[EMBEDDING].shape)}, all finite")
    if tensors is None:
        return
    for tool in against:
        if tool not in readers(found.layout):
            report.run(tool, lambda tool=tool: _unread(tool, found))  # type: ignore[misc]
    if weights is not None:
        report.run("equal to memory", lambda: _same(tensors, weights))
    if found.layout == "a1111":
        report.run("a1111", lambda: _plain(found))
    if not report.passed or not (base or found.base):  # a bare tensor does not say what it is for
        return
    family = load_base(found, base)
    report.run("text encoder", lambda: _fits(found, family))
    if report.passed and "diffusers" in against:
        report.run("diffusers", lambda: _moves(found, family))


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through ``finetune.load_aesthetic``; ``strength`` is what the file's own weight is multiplied by."""
    weight = float(said(found).get("weight", DEFAULT_WEIGHT))
    load_aesthetic(pipeline, found.path, weight=strength * weight)


def _header(weights: Weights, family: ModelFamily, recipe: Recipe) -> dict[str, str]:
    own = {
        "version": __version__,
        "kind": "aesthetic",
        "layout": "diffusers",
        "family": family.name,
        **base_of(recipe),
        "recipe": recipe.recipe,
        "lock": locked(recipe),
    }
    told = {f"{OWN}{name}": text for name, text in own.items() if text}
    return told | {f"{HEADER}{name}": text for name, text in weights.settings.items()}


def _unread(tool: str, found: Identity) -> str:
    raise GuardError(f"{tool} reads no aesthetic embedding of layout {found.layout}")


def _same(tensors: dict[str, Tensor], weights: Weights) -> str:
    for name in tensors:
        if not torch.equal(tensors[name], weights.tensors[name]):
            raise GuardError(f"{name} differs from what was made")
    return "bit for bit"


def _plain(found: Identity) -> str:
    """What A1111's extension asks of a file: a bare float32 tensor [1, d] in an archive without extras."""
    held: Tensor = read_pickle(found.path)
    if held.dtype != torch.float32 or held.ndim != 2:
        raise GuardError(f"{list(held.shape)} of {held.dtype}; expected float32 [1, d]")
    with zipfile.ZipFile(found.path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if extra := {name for name in names if name not in ("data.pkl", "version") and not name.startswith("data/")}:
        raise GuardError(f"the archive holds {min(extra)!r}, which its check for code refuses")
    note = "" if held.shape[1] == 768 else " (its extension reads CLIP-L's 768 alone)"
    return f"a bare float32 tensor {list(held.shape)}{note}"


def _fits(found: Identity, family: ModelFamily) -> str:
    there = encoder_digest(family.fresh("text_encoder"))
    if expected := said(found).get("encoder"):
        require_encoder(found, expected, there)
        return f"the base's own, digest {there[:12]}"
    return f"of {family.source}; the file does not say which one it is for"


@torch.no_grad()
def _moves(found: Identity, family: ModelFamily) -> str:
    """One prompt through diffusers' own pipeline: it moves, and nothing else does."""
    pipeline: Any = family.pipeline()
    asked = ("a photo of a dog", pipeline.device, 1, True)
    with quiet():
        plain, away = pipeline.encode_prompt(*asked)
        with load_aesthetic(pipeline, found.path):
            moved, guided = pipeline.encode_prompt(*asked)
        again, _ = pipeline.encode_prompt(*asked)
    if not torch.equal(away, guided) or not torch.equal(plain, again):
        raise UserError("the empty prompt or the text encoder itself was changed")
    change = float((moved - plain).norm() / plain.norm())
    if change == 0.0 and min(float(said(found).get(name, 1)) for name in ("steps", "weight")) > 0:
        raise GuardError("a prompt's encoding is what it was")
    return f"a prompt's encoding moves by {change:.1%} of its length; the empty prompt and the encoder stay"
