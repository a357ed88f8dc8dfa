"""From a single file to a diffusers folder, made once and kept."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor, nn

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families.folder import Part, file_digest
from finetune.families.originals import clip
from finetune.families.originals.checkpoint import Checkpoint, opened, read_checkpoint
from finetune.families.originals.place import Place, Settings
from finetune.families.originals.template import Template, parts_of, template
from finetune.files import PARTIAL, replacing_folder, stream_tensors

_VERSION = "1"  # of what is written for the same file and template
_UNET = "model.diffusion_model."


def converted(config: ModelConfig) -> Path:
    """The diffusers folder below ``config.cache`` that holds what the file ``config.path`` does, in the file's dtype.

    It is named by the file's content and what else decides it, so a changed file makes another folder. One process
    writes it, tensor by tensor, and others wait for it; it is whole or not there.

    Raises:
        UserError: the file is of no known architecture, or of other sizes than its settings say, or as ``template``.
    """
    path = Path(config.path).expanduser()
    checkpoint = read_checkpoint(path)
    beside = template(checkpoint, config)
    content = file_digest(path)
    name = hashlib.sha256(f"{_VERSION} {content} {beside.digest()}".encode()).hexdigest()[:32]
    folder = Path(config.cache).expanduser() / "models" / name
    if not _whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _whole(folder):
                _write(checkpoint, beside, folder)
    return folder


def meta(part: Part, settings: Settings) -> dict[str, Tensor]:
    """A network's weights on the meta device, by their names in diffusers' files."""
    library, _ = part.kind.split(".")
    with torch.device("meta"):
        built: nn.Module = (
            part.type.from_config(dict(settings))
            if library == "diffusers"
            else part.type(part.type.config_class(**settings))
        )
    weights = {name: value for name, value in built.state_dict().items() if value.is_floating_point()}
    return weights if library == "diffusers" else {clip.in_full(name): value for name, value in weights.items()}


def _whole(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _write(checkpoint: Checkpoint, beside: Template, folder: Path) -> None:
    """Only the holder of the lock comes here, so that what lies there half-written is nobody's."""
    parts = parts_of(checkpoint.layout)
    found = {part.subfolder: places(checkpoint, beside, part) for part in parts}
    for left in folder.parent.glob(f"{PARTIAL}*-{folder.name}"):
        shutil.rmtree(left, ignore_errors=True)
    with replacing_folder(folder) as written, opened(checkpoint.path) as file:
        beside.write(written)
        for part in parts:
            stem = "model" if part.tokenizer else "diffusion_pytorch_model"
            stream_tensors(
                written / part.subfolder / f"{stem}.safetensors",
                {
                    name: place.take(checkpoint.tensors[place.key].blank)
                    for name, place in found[part.subfolder].items()
                },
                partial(_read, checkpoint, file, found[part.subfolder]),
            )


def _read(checkpoint: Checkpoint, file: safe_open, places: Mapping[str, Place], name: str) -> Tensor:
    place = places[name]
    return place.take(file.get_tensor(checkpoint.tensors[place.key].key))


def places(checkpoint: Checkpoint, beside: Template, part: Part) -> Mapping[str, Place]:
    """Where a network's weights stand in the file, each of the right shape, by their names in diffusers' files.

    Raises:
        UserError: one is missing or of another shape, or the U-Net has more of them.
    """
    settings = beside.documents[f"{part.subfolder}/config.json"]
    weights, layout, tensors = meta(part, settings), checkpoint.layout, checkpoint.tensors
    found = layout.places(part.subfolder, weights, settings)
    where = f"{checkpoint.path}: {part.subfolder}"
    if missing := sorted(place.key for place in found.values() if place.key not in tensors):
        raise UserError(f"{where} lacks {len(missing)} tensors, for example {missing[0]!r}; {_advice(beside)}")
    for name, place in found.items():
        shape, wanted = place.take(tensors[place.key].blank).shape, weights[name].shape
        if shape != wanted:
            raise UserError(
                f"{where}: {place.key!r} makes a weight of {list(shape)}; expected {list(wanted)}; {_advice(beside)}"
            )
    own = {key for key in tensors if key.startswith(_UNET)} if part.subfolder == "unet" else set()
    if more := sorted(own - {place.key for place in found.values()}):
        raise UserError(f"{where} has {len(more)} tensors too many, for example {more[0]!r}; {_advice(beside)}")
    return found


def _advice(beside: Template) -> str:
    return f"it is not of the sizes of {beside.source}: name a diffusers folder of its kind with model.like"
