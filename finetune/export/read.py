"""From a file on disk back to an adapter, whatever the layout."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.adapter import Weights
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export import kohya, peft
from finetune.export.kinds import KINDS, Contents, kind
from finetune.export.layers import Layer, weights_of
from finetune.export.metadata import OWN
from finetune.family import ExportNames

CONVENTIONAL = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
WORD = "learned_embeds.safetensors"  # the same for a new word
MODEL = "model"
SINGLE = "single-file"
DELTA_FILE = "delta.safetensors"


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
        path: the file, or a whole model's folder.
        kind: a name of ``finetune.export.kinds.KINDS``.
        layout: one of the kind's; of whole models "model" for a diffusers folder and "single-file".
        metadata: of the header; empty for folders.
    """

    path: Path
    kind: str
    layout: str
    metadata: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Whether it is a model of its own, which needs no base."""
        return self.layout in (MODEL, SINGLE)

    @property
    def base(self) -> str | None:
        """The base model that a file says it was trained on."""
        return self.metadata.get(f"{OWN}base")

    @property
    def prompt_chunks(self) -> int:
        """How long the prompts may be that a file was trained with; 1 where it does not say a number."""
        said = self.metadata.get(f"{OWN}prompt_chunks", "")
        return int(said) if re.fullmatch(r"[1-9]\d{0,3}", said) else 1

    @property
    def format(self) -> Format:
        """Of a LoRA file."""
        return FORMATS[self.layout]


def identify(path: Path) -> Identity:
    """Say what ``path`` is: an adapter file, a whole model, or the folder of a run that holds one of them.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    path = locate(path)
    if path.is_dir():
        return Identity(path, "full", MODEL, {})
    keys, metadata = read_contents(path)
    for name in KINDS:
        layout = kind(name).recognise(Contents(path, keys, metadata))
        if layout is not None:
            return Identity(path, name, layout, metadata)
    example = f"; its first key is {keys[0]!r}" if keys else "; it holds no tensors"
    raise UserError(f"{path}: is no adapter of a kind that is known ({', '.join(KINDS)}){example}")


def pieces(path: Path) -> list[Identity]:
    """All that has to be loaded to draw with ``path``: itself, or what a run left below it, one file of each kind
    and new word.

    Raises:
        UserError: there is nothing, or several files of one kind and layout.
    """
    if path.is_file() or (path / "model_index.json").is_file():
        return [identify(path)]
    folder = path / "adapters" if (path / "adapters").is_dir() else path
    found = [Identity(folder / MODEL, "full", MODEL, {})] if (folder / MODEL / "model_index.json").is_file() else []
    files = _files(folder)
    found += [identify(file) for file in files]
    chosen: dict[tuple[str, str], Identity] = {}
    for one in sorted(found, key=lambda one: (KINDS.index(one.kind), kind(one.kind).LAYOUTS.index(one.layout))):
        held = chosen.setdefault((one.kind, one.metadata.get(f"{OWN}token", "")), one)
        if held is not one and held.layout == one.layout:
            raise UserError(f"{folder}: holds several files; name one of {', '.join(file.name for file in files)}")
    if len(chosen) > 1:
        chosen.pop(("pivotal", ""), None)  # a bundle holds what lies beside it in files of their own
    return list(chosen.values()) or [identify(path)]


def locate(path: Path) -> Path:
    """The adapter file or model folder that ``path`` means: itself, or what a run left below it.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix not in (".safetensors", ".pt"):
            raise UserError(
                f"{path}: expected a .safetensors file, or a .pt that A1111 reads; {path.suffix or 'no suffix'} is "
                "not read"
            )
        return path
    for folder in (path, path / "adapters"):
        for found in (folder, folder / MODEL):
            if (found / "model_index.json").is_file():
                return found
        for name in (CONVENTIONAL, DELTA_FILE, WORD):
            if (folder / name).is_file():
                return folder / name
        files = _files(folder)
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"{folder}: holds several files; name one of {', '.join(file.name for file in files)}")
    raise UserError(f"{path}: holds no adapter: no {CONVENTIONAL}, no model_index.json and no adapters/")


def _files(folder: Path) -> list[Path]:
    """A folder's adapter files: what A1111 alone reads only where there is nothing else."""
    return sorted(folder.glob("[!.]*.safetensors")) or sorted(folder.glob("[!.]*.pt"))


def read(path: Path, names: Mapping[str, ExportNames]) -> Weights:
    """An adapter file or model folder as ``Weights`` under canonical names, in the dtype of the file.

    Args:
        names: the family's ``export_names``.

    Raises:
        UserError: the file is damaged, a key is unknown or lacks its partner.
    """
    found = identify(path)
    if found.whole:
        from finetune.export.full import read_model
        from finetune.families import model_folder

        return read_model(model_folder(ModelConfig(path=str(found.path))), names)
    if found.kind == "full":
        from finetune.export.delta import unpack

        return Weights("full", unpack(read_tensors(found.path), names))
    if found.kind == "embedding":
        from finetune.export.embedding import read as read_word

        word = read_word(found.path)
        networks = {called.words: network for network, called in names.items() if network != "denoiser"}
        only = next(iter(networks.values()), "text_encoder")
        return Weights(
            "embedding", {f"{networks.get(key, only)}.{word.token}": rows for key, rows in word.parts.items()}
        )
    if found.kind == "hypernetwork":
        from finetune.export.kinds.hypernetwork import read_weights

        return read_weights(found)
    if found.kind == "lycoris":
        from finetune.export.kinds.lycoris import read as read_changes

        return read_changes(found, names)
    if found.layout not in FORMATS:
        raise UserError(f"{found.path}: holds whole differences of weights, from which no factors can be had")
    try:
        unpacked = found.format.unpack(read_tensors(found.path), names)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from error
    return weights_of(unpacked, json.loads(found.metadata.get(f"{OWN}settings", "{}")))


def read_contents(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys and metadata of a safetensors file, or the outermost keys of an A1111 pickle.

    Raises:
        UserError: it is damaged or something else.
    """
    if path.suffix == ".safetensors":
        return read_header(path)
    loaded = read_pickle(path)
    return sorted(map(str, loaded)) if isinstance(loaded, dict) else [""], {}


def read_pickle(path: Path) -> Any:
    """What an A1111 ``.pt`` holds: plain containers, numbers, text and tensors; any other object is refused unread.

    Raises:
        UserError: it is damaged, or holds objects that only code could make.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: is no .pt of tensors and plain values: {reason}") from error


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
