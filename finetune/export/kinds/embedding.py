"""New words: ``learned_embeds.safetensors`` for diffusers, ``<word>.safetensors`` and ``<word>.pt`` for web UIs.

There is no ``.pt`` of a word that several text encoders read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import Weights
from finetune.config.adapters import new_words
from finetune.config.schema import Recipe
from finetune.errors import GuardError, UserError
from finetune.export import check_embedding
from finetune.export.checks import Report
from finetune.export.embedding import CONVENTIONAL, Stored, by_word, file_stem, is_several, read
from finetune.export.embedding import write as write_file
from finetune.export.kinds import Contents, wanted
from finetune.export.layers import check as check_tensors
from finetune.export.metadata import OWN, describe
from finetune.export.read import Identity
from finetune.export.words import load_word
from finetune.family import ExportNames, ModelFamily

LAYOUTS = ("diffusers", "a1111")


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """No word may be where it began in all text encoders; the settings say how far each has moved."""
    moved = json.loads(weights.settings.get("moved", "{}"))
    for word in dict.fromkeys(name.split(".", 1)[1] for name in moved):
        if not any(far for name, far in moved.items() if name.split(".", 1)[1] == word):
            raise GuardError(f"nothing was learned: {word!r} is where it began")


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """One file a word and layout, two for A1111, which takes either.

    Raises:
        GuardError: the rows are not finite, or a file reads back differently.
    """
    check_tensors(weights.tensors)
    dtype = getattr(torch, recipe.export.dtype)
    found = by_word(weights.tensors, family.export_names)
    written = []
    for token, parts in found.items():
        rows = {encoder: one.to(dtype) for encoder, one in parts.items()}
        for layout, names in _file_names(token, list(found), recipe).items():
            header = _header(layout, token, len(next(iter(rows.values()))), weights, family, recipe)
            one = Stored(token, rows, header, recipe.train.total_steps, recipe.model.path)
            for path in (folder / name for name in names if len(rows) == 1 or not name.endswith(".pt")):
                write_file(path, one)
                check_embedding.require_same(path, one)
                written.append(path)
    return written


def file_names(recipe: Recipe, names: Mapping[str, ExportNames]) -> list[str]:
    """What the files of a recipe's words are called, for a family of these names."""
    words = new_words(recipe.adapter)
    tokens = [token.token for token in words.tokens] if words else []
    several = sum(bool(called.words) for called in names.values()) > 1
    found = [name for token in tokens for part in _file_names(token, tokens, recipe).values() for name in part]
    return [name for name in found if not several or not name.endswith(".pt")]


def recognise(contents: Contents) -> str | None:
    """By the header; files of others by their only key, a pickle by its own."""
    if contents.path.suffix == ".pt":
        return "a1111" if "string_to_param" in contents.keys else None
    if contents.metadata.get(f"{OWN}kind") == "embedding":
        return contents.metadata.get(f"{OWN}layout")
    if is_several(contents.keys):
        return "a1111"
    return "diffusers" if len(contents.keys) == 1 and "." not in contents.keys[0] else None


def readers(layout: str) -> tuple[str, ...]:
    """All of them: what differs is the name of the file, by which A1111 and ComfyUI call the word."""
    return ("diffusers", "kohya") if layout == "diffusers" else ("diffusers", "kohya", "comfyui", "a1111")


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_embedding``."""
    check_embedding.check_file(report, found, base, against, None if weights is None else weights.tensors)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through ``load_textual_inversion``, for each text encoder.

    Raises:
        UserError: another strength than 1 is asked for, the word is known already, or the width is another.
    """
    if strength != 1.0:
        raise UserError(f"{found.path} holds a word, which is used or not; strength {strength:g} is for other adapters")
    try:
        load_word(pipeline, read(found.path))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{found.path} does not fit the base: {str(error).splitlines()[0]}") from error


def _file_names(token: str, tokens: Sequence[str], recipe: Recipe) -> dict[str, list[str]]:
    stems = [file_stem(one) for one in tokens]
    stem = stems[tokens.index(token)]
    if stems.count(stem) > 1:
        stem += f"-{tokens.index(token)}"
    plain = CONVENTIONAL if len(tokens) == 1 else f"{CONVENTIONAL}-{stem}"
    if recipe.adapter.kind == "pivotal" and stem == Path(recipe.output).absolute().name:
        stem += "-word"  # beside it lies a LoRA that is called as the run is
    names = {"diffusers": [f"{plain}.safetensors"], "a1111": [f"{stem}.safetensors", f"{stem}.pt"]}
    return {layout: names[layout] for layout in wanted(recipe, "embedding", LAYOUTS)}


def _header(
    layout: str, token: str, vectors: int, weights: Weights, family: ModelFamily, recipe: Recipe
) -> dict[str, str]:
    header = describe(layout, (), weights.settings, family, recipe)
    architecture = header["modelspec.architecture"].removesuffix("/lora") + "/textual-inversion"
    del header[f"{OWN}layers"]
    return header | {
        f"{OWN}kind": "embedding",
        f"{OWN}token": token,
        f"{OWN}vectors": str(vectors),
        "modelspec.architecture": architecture,
        "modelspec.title": token,
        "modelspec.trigger_phrase": token,
        "modelspec.is_negative_embedding": "false",
    }
