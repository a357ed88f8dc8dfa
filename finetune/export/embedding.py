"""Files of new words: one word a file, ``{token: [n, D]}`` as safetensors, and A1111's ``.pt``.

Where a model has several text encoders a file holds the rows of each by its name: ``{clip_l: [n, 768], clip_g: ...}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.metadata import OWN
from finetune.export.pickles import write_pickle
from finetune.export.read import read_header, read_pickle, read_tensors
from finetune.family import ExportNames
from finetune.files import write_tensors

CONVENTIONAL = "learned_embeds"  # the name that diffusers looks for in a folder
ALONE = ""
"""Stands for the only text encoder of a model."""
ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""Keys of files for models with several text encoders."""
UNNAMED = ("emb_params", "emp_params")
"""Keys of other trainers' files, whose word is the name of the file."""
_STAR = 265  # id of "*" in CLIP's vocabulary: what A1111 writes for every word


@dataclass(frozen=True)
class Stored:
    """A word at rest.

    Attributes:
        token: as it stands in prompts.
        parts: floating [n, D] for each text encoder, by its name in files; ``ALONE`` for the only one.
        metadata: of a safetensors file's header.
        step: updates that it has seen.
        base: as in a recipe's ``model.path``, where it is known.
    """

    token: str
    parts: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    step: int = 0
    base: str | None = None

    @property
    def vectors(self) -> int:
        """How many tokens it is."""
        return len(next(iter(self.parts.values())))

    @property
    def moved(self) -> float | None:
        """How far it has moved from where it started, at most in any encoder, where the header says so."""
        moved = json.loads(self.metadata.get(f"{OWN}settings", "{}")).get("moved")
        found = [far for key, far in json.loads(moved or "{}").items() if key.partition(".")[2] == self.token]
        return max(found, default=None)


def write(path: Path, stored: Stored) -> None:
    """Write a file of the layout that the suffix names, whole or not at all. A ``.pt`` is for one text encoder."""
    if path.suffix == ".pt":
        write_pickle(
            path,
            {
                "string_to_token": {"*": _STAR},
                "string_to_param": {"*": stored.parts[ALONE].contiguous()},
                "name": stored.token,
                "step": stored.step,
                "sd_checkpoint": None,
                "sd_checkpoint_name": stored.base,
            },
        )
    else:
        named = {encoder or stored.token: rows.contiguous() for encoder, rows in stored.parts.items()}
        write_tensors(path, named, stored.metadata)


def read(path: Path) -> Stored:
    """A word's file, of either layout, in the dtype of the file.

    Raises:
        UserError: it is damaged or something else.
    """
    if path.suffix == ".pt":
        return _unpickled(path, read_pickle(path))
    tensors, (_, metadata) = read_tensors(path), read_header(path)
    base = metadata.get(f"{OWN}base")
    if is_several(tensors):
        named = {"t5xxl" if encoder == "t5" else encoder: rows for encoder, rows in tensors.items()}
        parts = {encoder: _rows(path, named[encoder]) for encoder in ENCODERS if encoder in named}
        if len({len(rows) for rows in parts.values()}) > 1:
            counts = ", ".join(f"{encoder} {len(rows)}" for encoder, rows in parts.items())
            raise UserError(f"{path}: holds unlike numbers of vectors: {counts}")
        return Stored(metadata.get(f"{OWN}token", path.stem), parts, metadata, base=base)
    if len(tensors) != 1:
        known = ", ".join(ENCODERS)
        raise UserError(f"{path}: is no file of a new word: it holds {len(tensors)} tensors, expected one, or {known}")
    token, rows = next(iter(tensors.items()))
    return Stored(path.stem if token in UNNAMED else token, {ALONE: _rows(path, rows)}, metadata, base=base)


def is_several(keys: Iterable[str]) -> bool:
    """Whether a file with such keys holds the rows of named text encoders; "t5" is another name of ``t5xxl``."""
    found = set(keys)
    return bool(found) and found <= {*ENCODERS, "t5"}


def by_word(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> dict[str, dict[str, Tensor]]:
    """``<network>.<token>`` -> rows as token -> name of the text encoder in files -> rows."""
    several = len({key.partition(".")[0] for key in tensors}) > 1
    found: dict[str, dict[str, Tensor]] = {}
    for key, rows in tensors.items():
        network, _, token = key.partition(".")
        found.setdefault(token, {})[names[network].words if several else ALONE] = rows
    return found


def file_stem(token: str) -> str:
    """``token`` as a file name, which is what A1111 and ComfyUI call it by: "zib" of "<zib>"."""
    return re.sub(r"[^\w-]+", "", token) or "word"


def _unpickled(path: Path, content: Any) -> Stored:
    try:
        rows = _rows(path, content["string_to_param"]["*"])
        token, step = str(content.get("name") or path.stem), int(content.get("step") or 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no embedding of A1111's: {error!r}") from error
    # A1111 writes a hash beside the name of its checkpoint, which is no name that could be loaded here
    base = content.get("sd_checkpoint_name") if content.get("sd_checkpoint") is None else None
    return Stored(token, {ALONE: rows}, step=step, base=base)


def _rows(path: Path, rows: Any) -> Tensor:
    if (
        not isinstance(rows, Tensor)
        or rows.ndim not in (1, 2)
        or rows.dtype
        not in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        )
    ):
        found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise UserError(f"{path}: is no file of a new word: expected numbers [vectors, width], found {found}")
    return rows.reshape(-1, rows.shape[-1])
