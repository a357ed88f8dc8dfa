"""Whole models: the base's diffusers folder with the trained weights in place of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import UserError
from finetune.export.overlay import Overlay, cast
from finetune.export.stream import tensors_of, writing
from finetune.family import ExportNames
from finetune.files import replacing_folder, write_json

_STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' and transformers' own
_INDEX = "model_index.json"
_CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


def write_model(
    weights: Weights,
    base: Path,
    path: Path,
    names: Mapping[str, ExportNames],
    dtype: torch.dtype,
    scheduler: Any = None,
) -> Path:
    """Write a diffusers folder that is ``base`` with the trained weights put in, whole or not at all.

    One tensor is in memory at a time. Only safetensors of the ordinary names are taken over: other variants and
    pickles would hold untrained weights. The level that the installed transformers leaves out of a text encoder's
    names is put back, because older loaders take a file without it for random weights.

    Args:
        base: a diffusers folder.
        path: becomes the new folder.
        names: of the family's networks.
        dtype: of all floating-point weights.
        scheduler: of diffusers, in place of the base's.

    Raises:
        GuardError: a trained tensor is empty, not finite or has no place of its shape in the base, or none differs
            from the base.
        UserError: a component of the base has no safetensors.
    """
    overlay = Overlay(weights, dtype)
    with rewriting(base, path, names, overlay.over, dtype, scheduler):
        overlay.finish(base)
    return path


@contextmanager
def rewriting(
    base: Path,
    path: Path,
    names: Mapping[str, ExportNames],
    put: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype | None = None,
    scheduler: Any = None,
) -> Iterator[Path]:
    """Write ``base`` as the folder ``path``, tensor by tensor, with what ``put`` makes of each weight of a network.

    What is inside the ``with`` comes last, with the folder under a temporary name; if it raises, nothing is written.

    Args:
        put: takes a canonical name and the base's tensor.
        dtype: of all floating-point weights; each as it was where it is not given.

    Raises:
        UserError: a component of the base has no safetensors.
    """
    with replacing_folder(path) as folder:
        for card in _CARDS:
            if (base / card).is_file():
                shutil.copyfile(base / card, folder / card)
        write_json(folder / _INDEX, _index(base, scheduler))
        for component in components(base):
            network = next((name for name, called in names.items() if called.diffusers == component), None)
            level = names[network].missing_level if network else ""
            _copy_settings(base / component, folder / component, dtype)
            for file in weight_files(base / component):
                with writing(folder / component / file.name) as writer:
                    for key, old in tensors_of(file):
                        short = key.removeprefix(level)
                        new = put(f"{network}.{short}", old) if network else old
                        writer.add({level + short: cast(new, dtype or old.dtype)})
            if level:
                _prefix_index(folder / component, level)
        if scheduler is not None:
            scheduler.save_pretrained(folder / "scheduler")
        yield folder


def read_model(path: Path, names: Mapping[str, ExportNames]) -> Weights:
    """All weights of a diffusers folder that have a place in ``names``, under canonical names, in the files' dtype.

    What is no floating-point number is left out: older text encoders list their positions among the weights.
    """
    tensors = {
        f"{network}.{key.removeprefix(called.missing_level)}": value
        for network, called in names.items()
        for file in weight_files(path / called.diffusers)
        for key, value in tensors_of(file)
        if value.is_floating_point()
    }
    return Weights("full", tensors)


def components(folder: Path) -> list[str]:
    """Names of a pipeline's parts that have a folder."""
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(name for name in index if not name.startswith("_") and (folder / name).is_dir())


def without(folder: Path) -> list[str]:
    """Names of a pipeline's parts that a folder says it has not."""
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(name for name, value in index.items() if value == [None, None])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that a component is loaded from, sharded or not; none where it has no weights.

    Raises:
        UserError: it has weights, but as pickles or variants only.
    """
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    others = sorted(file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".ckpt", ".safetensors"})
    if others:
        raise UserError(f"{folder}: no {' or '.join(_STEMS)}.safetensors, only {', '.join(others)}, which is not read")
    return []


def _index(base: Path, scheduler: Any) -> dict[str, Any]:
    """The list of the pipeline's parts. A part that the base names but does not hold is left out of it."""
    index: dict[str, Any] = json.loads((base / _INDEX).read_text(encoding="utf-8"))
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_") and not (base / name).is_dir():
            index[name] = [None, None]
    if scheduler is not None:
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    return index


def _copy_settings(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy what is beside the weights: settings, vocabularies. Settings that name the dtype get the new one."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in {".json", ".txt", ".jinja", ".model"}:
            shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        stated = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in settings}
        if any(settings[key] != value for key, value in stated.items()):
            write_json(config, settings | stated)


def _prefix_index(folder: Path, level: str) -> None:
    """Put ``level`` in front of the names in the lists of shards."""
    for index in folder.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {level + key.removeprefix(level): file for key, file in content["weight_map"].items()}
        write_json(index, content)
