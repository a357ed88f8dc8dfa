"""From a file on disk back to an adapter, whatever the layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import UserError
from finetune.export import kohya, peft
from finetune.export.layers import Layer, weights_of
from finetune.export.metadata import OWN
from finetune.family import ExportNames

CONVENTIONAL = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
MODEL = "model"


@dataclass(frozen=True)
class Format:
    """A layout of LoRA files.

    Attributes:
        readers: tools that read it.
        pack: layers to tensors. unpack: back, every key read. recognises: whether keys are of this layout.
    """

    name: str
    readers: tuple[str, ...]
    pack: Callable[[Sequence[Layer], Mapping[str, ExportNames], torch.dtype], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Mapping[str, ExportNames]], list[Layer]]
    recognises: Callable[[Iterable[str]], bool]


FORMATS: Mapping[str, Format] = {
    "diffusers": Format("diffusers", ("diffusers",), peft.pack, peft.unpack, peft.recognises),
    "kohya": Format("kohya", ("diffusers", "kohya", "comfyui", "a1111"), kohya.pack, kohya.unpack, kohya.recognises),
}


@dataclass(frozen=True)
class Identity:
    """What a file or folder is.

    Attributes:
        path: the file, or the folder of a whole model.
        kind: "lora" or "full".
        layout: a name of ``FORMATS``, or "model" for a diffusers folder.
        metadata: of the header; empty for folders.
    """

    path: Path
    kind: str
    layout: str
    metadata: Mapping[str, str]

    @property
    def base(self) -> str | None:
        """The base model that a LoRA says it was trained on."""
        return self.metadata.get(f"{OWN}base")

    @property
    def format(self) -> Format:
        """Of a LoRA file."""
        return FORMATS[self.layout]


def identify(path: Path) -> Identity:
    """Say what ``path`` is: a LoRA file, a diffusers folder, or the folder of a run that holds one of them.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    path = locate(path)
    if path.is_dir():
        return Identity(path, "full", MODEL, {})
    keys, metadata = read_header(path)
    for layout in FORMATS.values():
        if layout.recognises(keys):
            return Identity(path, "lora", layout.name, metadata)
    example = f"; its first key is {keys[0]!r}" if keys else "; it holds no tensors"
    raise UserError(f"{path}: is no LoRA of a layout that is known ({', '.join(FORMATS)}){example}")


def locate(path: Path) -> Path:
    """The LoRA file or model folder that ``path`` means: itself, or what a run left below it.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: expected a .safetensors file; pickles ({path.suffix or 'no suffix'}) are not read"
            )
        return path
    for folder in (path, path / "adapters"):
        for found in (folder, folder / MODEL):
            if (found / "model_index.json").is_file():
                return found
        if (folder / CONVENTIONAL).is_file():
            return folder / CONVENTIONAL
        files = sorted(folder.glob("[!.]*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"{folder}: holds several files; name one of {', '.join(file.name for file in files)}")
    raise UserError(f"{path}: holds no adapter: no {CONVENTIONAL}, no model_index.json and no adapters/")


def read(path: Path, names: Mapping[str, ExportNames]) -> Weights:
    """An adapter file or model folder as ``Weights`` under canonical names, in the dtype of the file.

    Args:
        names: the family's ``export_names``.

    Raises:
        UserError: the file is damaged, a key is unknown or lacks its partner.
    """
    found = identify(path)
    if found.kind == "full":
        from finetune.export.full import read_model

        return read_model(found.path, names)
    try:
        unpacked = found.format.unpack(read_tensors(found.path), names)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from error
    return weights_of(unpacked, json.loads(found.metadata.get(f"{OWN}settings", "{}")))


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys and metadata of a safetensors file.

    Raises:
        UserError: it is damaged or something else.
    """
    with _opened(path) as file:
        return sorted(file.keys()), dict(file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: it is damaged or something else.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise UserError(f"{path}: no whole safetensors file ({size} bytes): {error}") from error
