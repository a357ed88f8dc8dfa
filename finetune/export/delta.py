"""Trained weights alone, to be put in the base's place: what Custom Diffusion calls a delta, a small file.

A file of layout delta holds whole weights, not differences, so that what is loaded is bit for bit what was trained.
Its keys are those of the model folder's files behind the name of the part: ``unet.down_blocks.0...to_k.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.errors import GuardError, UserError
from finetune.export.full import weight_files
from finetune.export.layers import check
from finetune.export.metadata import OWN
from finetune.export.read import read_header, read_tensors
from finetune.family import ExportNames
from finetune.files import write_tensors

DELTA = "delta"
LEVEL = "text_model."  # some versions of transformers have it in a text encoder's names


def write_delta(
    weights: Weights,
    base: Path,
    path: Path,
    names: Mapping[str, ExportNames],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> Path:
    """Write the trained weights of a diffusers folder ``base``, whole or not at all.

    Raises:
        GuardError: a trained tensor is empty, not finite or has no place of its shape in the base, or none differs
            from the base.
    """
    check(weights.tensors)
    untouched = dict(base_weights(base, names, weights.tensors))
    for name, tensor in weights.tensors.items():
        if name not in untouched:
            raise GuardError(f"{name} has no place in {base}")
        if untouched[name].shape != tensor.shape:
            raise GuardError(f"{name} is {list(tensor.shape)}, but {list(untouched[name].shape)} in the base model")
    if all(torch.equal(untouched[name].to(dtype), tensor.to(dtype)) for name, tensor in weights.tensors.items()):
        raise GuardError("nothing was learned: every trained weight equals the base model's")
    write_tensors(path, pack(weights.tensors, names, dtype), metadata)
    return path


def pack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical names -> a file's keys."""
    packed = {}
    for name, tensor in tensors.items():
        network, parameter = name.split(".", 1)
        called = names[network]
        packed[f"{called.diffusers}.{called.missing_level}{parameter}"] = tensor.to(dtype)
    return packed


def unpack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> dict[str, Tensor]:
    """A file's keys -> canonical names, every key read.

    Raises:
        UserError: a key belongs to no part of the family.
    """
    networks = {called.diffusers: network for network, called in names.items()}
    found = {}
    for key, tensor in tensors.items():
        component, _, parameter = key.partition(".")
        if component not in networks or not parameter:
            raise UserError(f"unknown key {key!r}; expected <{'|'.join(sorted(networks))}>.<parameter>")
        network = networks[component]
        found[f"{network}.{parameter.removeprefix(names[network].missing_level)}"] = tensor
    return found


def base_weights(
    base: Path, names: Mapping[str, ExportNames], wanted: Mapping[str, object]
) -> Iterator[tuple[str, Tensor]]:
    """Those of ``wanted`` that a diffusers folder holds, by canonical name; no other tensor is read."""
    for network in sorted({name.split(".")[0] for name in wanted} & names.keys()):
        called = names[network]
        for file in weight_files(base / called.diffusers):
            with safe_open(file, framework="pt") as opened:
                for key in sorted(opened.keys()):
                    name = f"{network}.{key.removeprefix(called.missing_level)}"
                    if name in wanted:
                        yield name, opened.get_tensor(key)


@torch.no_grad()
def load_delta(pipeline: Any, path: str | Path, strength: float = 1.0) -> int:
    """Put a delta's weights in the place of a diffusers pipeline's own, and return how many there were.

    Args:
        strength: 0 is what the pipeline had, 1 what was trained, bit for bit; in between and beyond, the line
            through both.

    Raises:
        UserError: the file is damaged or no delta, or the pipeline has no weight of that name and shape.
    """
    path = Path(path)
    if read_header(path)[1].get(f"{OWN}layout") != DELTA:
        raise UserError(f"{path}: is no delta of finetune's; its header does not say so")
    places = [(parameter, tensor) for parameter, tensor in _places(pipeline, path, read_tensors(path))]
    for parameter, tensor in places:
        trained = tensor.to(parameter)
        # not written into the tensor that was there, which others may share
        parameter.data = trained if strength == 1.0 else parameter + strength * (trained - parameter)
    return len(places)


def _places(pipeline: Any, path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        part = getattr(pipeline, component, None)
        if not isinstance(part, nn.Module):
            raise UserError(f"{path} does not fit: the pipeline has no {component}")
        held = dict(part.named_parameters())
        attempts = (name, name.removeprefix(LEVEL), LEVEL + name)
        found = next((held[one] for one in attempts if one in held), None)
        if found is None:
            raise UserError(f"{path} does not fit: the pipeline has no weight {key!r}")
        if found.shape != tensor.shape:
            raise UserError(f"{path} does not fit: {key} is {list(tensor.shape)}, the pipeline's {list(found.shape)}")
        yield found, tensor
