"""New words inside a LoRA file, as A1111 from 1.7 on reads them: keys ``bundle_emb.<word>.string_to_param.*``, or
``bundle_emb.<word>.clip_l`` and ``.clip_g`` where a model has two text encoders.

The LoRA has kohya's layout. The words are known to the web UI while the LoRA is called. Diffusers refuses such a file,
ComfyUI and Forge ignore the words, so it is written beside the separate files and not in their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import GuardError, UserError
from finetune.export import kohya
from finetune.export.embedding import ALONE, ENCODERS, Stored, by_word
from finetune.export.layers import Layer, layers
from finetune.export.read import read_tensors
from finetune.export.words import load_word
from finetune.family import ExportNames

PREFIX = "bundle_emb."
_PARAM = "string_to_param.*"

Words = dict[str, dict[str, Tensor]]
"""Word -> name of a text encoder in files, ``ALONE`` for the only one -> rows [vectors, D]."""


class Parts(NamedTuple):
    """A bundle taken apart: the tensors of a kohya LoRA, and word -> text encoder -> rows [vectors, D]."""

    lora: dict[str, Tensor]
    words: Words


def parts_of(weights: Weights, names: Mapping[str, ExportNames]) -> tuple[list[Layer], Words]:
    """Trained weights of kind pivotal, with a LoRA, as its layers and the words.

    Raises:
        GuardError: as ``layers`` does.
    """
    told = json.loads(weights.settings["words"])
    words = {token["token"] for token in json.loads(told["tokens"])}
    rows = {name: value for name, value in weights.tensors.items() if name.split(".", 1)[1] in words}
    rest = {name: value for name, value in weights.tensors.items() if name not in rows}
    return layers(Weights("lora", rest, json.loads(weights.settings["layers"]))), by_word(rows, names)


def pack(found: list[Layer], words: Words, names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        GuardError: a word holds a dot, which readers take for the end of its name.
    """
    if dotted := [word for word in words if "." in word]:
        raise GuardError(f"{dotted[0]!r} cannot be bundled: readers end its name at the dot")
    bundled = {
        f"{PREFIX}{word}.{encoder or _PARAM}": rows.to(dtype)
        for word, parts in words.items()
        for encoder, rows in parts.items()
    }
    return kohya.pack(found, names, dtype) | bundled


def unpack(tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors of a file, apart; every key read.

    Raises:
        UserError: a word's key has another form, or its rows are none.
    """
    words: Words = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            continue
        word, _, ending = key.removeprefix(PREFIX).partition(".")
        if ending not in (_PARAM, *ENCODERS) or not word or tensor.ndim != 2:
            raise UserError(f"{key!r} of shape {list(tensor.shape)}; expected {PREFIX}<word>.{_PARAM} [vectors, width]")
        words.setdefault(word, {})[ALONE if ending == _PARAM else ending] = tensor
    order = (ALONE, *ENCODERS)
    words = {word: {name: parts[name] for name in order if name in parts} for word, parts in words.items()}
    return Parts({key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}, words)


def load_bundle(pipeline: Any, path: str | Path, strength: float = 1.0) -> list[str]:
    """Put a bundle into a diffusers pipeline, by diffusers' own loaders, and return its words.

    Args:
        strength: how much the LoRA counts; the words are what they are.

    Raises:
        UserError: the file is damaged or does not fit the pipeline.
    """
    path = Path(path)
    found = unpack(read_tensors(path))
    try:
        for word, parts in found.words.items():
            load_word(pipeline, Stored(word, parts))
        pipeline.load_lora_weights(found.lora, adapter_name="bundle")
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"{path} does not fit the base: {str(error).splitlines()[0]}") from error
    if strength != 1.0:
        pipeline.set_adapters(["bundle"], [strength])
    return list(found.words)
