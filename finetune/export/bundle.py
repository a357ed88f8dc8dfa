"""New words inside a LoRA file, as A1111 from 1.7 on reads them: keys ``bundle_emb.<word>.string_to_param.*``.

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
from finetune.export.layers import Layer, layers
from finetune.export.read import read_tensors
from finetune.family import ExportNames

PREFIX, PARAM = "bundle_emb.", ".string_to_param.*"


class Parts(NamedTuple):
    """A bundle taken apart: the tensors of a kohya LoRA, and word -> rows [vectors, D]."""

    lora: dict[str, Tensor]
    words: dict[str, Tensor]


def parts_of(weights: Weights) -> tuple[list[Layer], dict[str, Tensor]]:
    """Trained weights of kind pivotal, with a LoRA, as its layers and word -> rows.

    Raises:
        GuardError: as ``layers`` does.
    """
    told = json.loads(weights.settings["words"])
    words = {token["token"] for token in json.loads(told["tokens"])}
    rows = {name.split(".", 1)[1]: value for name, value in weights.tensors.items() if name.split(".", 1)[1] in words}
    rest = {name: value for name, value in weights.tensors.items() if name.split(".", 1)[1] not in words}
    return layers(Weights("lora", rest, json.loads(weights.settings["layers"]))), rows


def pack(
    found: list[Layer], words: Mapping[str, Tensor], names: Mapping[str, ExportNames], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        GuardError: a word holds a dot, which readers take for the end of its name.
    """
    if dotted := [word for word in words if "." in word]:
        raise GuardError(f"{dotted[0]!r} cannot be bundled: readers end its name at the dot")
    bundled = {f"{PREFIX}{word}{PARAM}": rows.to(dtype) for word, rows in words.items()}
    return kohya.pack(found, names, dtype) | bundled


def unpack(tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors of a file, apart; every key read.

    Raises:
        UserError: a word's key has another form, or its rows are none.
    """
    words: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            continue
        word = key.removeprefix(PREFIX).removesuffix(PARAM)
        if not key.endswith(PARAM) or not word or tensor.ndim != 2:
            raise UserError(f"{key!r} of shape {list(tensor.shape)}; expected {PREFIX}<word>{PARAM} [vectors, width]")
        words[word] = tensor
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
        with torch.random.fork_rng(devices=[]):  # transformers draws rows that are then replaced
            for word, rows in found.words.items():
                pipeline.load_textual_inversion({word: rows}, token=word)
        pipeline.load_lora_weights(found.lora, adapter_name="bundle")
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"{path} does not fit the base: {str(error).splitlines()[0]}") from error
    if strength != 1.0:
        pipeline.set_adapters(["bundle"], [strength])
    return list(found.words)
