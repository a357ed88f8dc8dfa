"""Files of new words: one word a file, ``{token: [n, D]}`` as safetensors, and A1111's ``.pt``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.metadata import OWN
from finetune.export.pickles import write_pickle
from finetune.export.read import read_header, read_pickle, read_tensors
from finetune.files import write_tensors

CONVENTIONAL = "learned_embeds"  # the name that diffusers looks for in a folder
UNNAMED = ("emb_params", "emp_params", "clip_l")
"""Keys of other trainers' files, whose word is the name of the file."""
_STAR = 265  # id of "*" in CLIP's vocabulary: what A1111 writes for every word


@dataclass(frozen=True)
class Stored:
    """A word at rest.

    Attributes:
        token: as it stands in prompts.
        rows: [n, D], floating.
        metadata: of a safetensors file's header.
        step: updates that it has seen.
        base: as in a recipe's ``model.path``, where it is known.
    """

    token: str
    rows: Tensor
    metadata: dict[str, str] = field(default_factory=dict)
    step: int = 0
    base: str | None = None

    @property
    def moved(self) -> float | None:
        """How far it has moved from where it started, where the header says so."""
        moved = json.loads(self.metadata.get(f"{OWN}settings", "{}")).get("moved")
        found = {key.partition(".")[2]: value for key, value in json.loads(moved or "{}").items()}
        return found.get(self.token)


def write(path: Path, stored: Stored) -> None:
    """Write a file of the layout that the suffix names, whole or not at all."""
    rows = stored.rows.contiguous()
    if path.suffix == ".pt":
        write_pickle(
            path,
            {
                "string_to_token": {"*": _STAR},
                "string_to_param": {"*": rows},
                "name": stored.token,
                "step": stored.step,
                "sd_checkpoint": None,
                "sd_checkpoint_name": stored.base,
            },
        )
    else:
        write_tensors(path, {stored.token: rows}, stored.metadata)


def read(path: Path) -> Stored:
    """A word's file, of either layout, in the dtype of the file.

    Raises:
        UserError: it is damaged or something else.
    """
    if path.suffix == ".pt":
        return _unpickled(path, read_pickle(path))
    tensors, (_, metadata) = read_tensors(path), read_header(path)
    if len(tensors) != 1:
        raise UserError(f"{path}: is no file of a new word: it holds {len(tensors)} tensors, expected one")
    token, rows = next(iter(tensors.items()))
    return Stored(
        path.stem if token in UNNAMED else token, _rows(path, rows), metadata, base=metadata.get(f"{OWN}base")
    )


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
    return Stored(token, rows, step=step, base=base)


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
