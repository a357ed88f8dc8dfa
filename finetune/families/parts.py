"""What lies in a folder of diffusers: a model's parts, their settings and tokenizers."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError


@dataclass(frozen=True)
class Part:
    """A network of a model.

    Attributes:
        subfolder: where it lies; also its name in diffusers' pipelines.
        kind: library and class: "diffusers.UNet2DConditionModel".
        tokenizer: the subfolder of a text encoder's tokenizer.
        settings: in place of what its ``config.json`` says.
    """

    subfolder: str
    kind: str
    tokenizer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def type(self) -> Any:
        """The class itself, imported when it is asked for."""
        library, name = self.kind.split(".")
        return getattr(importlib.import_module(library), name)


def load_tokenizer(folder: Path, subfolder: str) -> Any:
    """A tokenizer of transformers; no code of the folder's own is run.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer, CLIPTokenizer

    # transformers makes an empty tokenizer of a folder that holds none, without a word
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if not any((folder / subfolder / name).is_file() for name in names):
        raise UserError(f"{folder}: the tokenizer is missing: no {subfolder}/tokenizer.json or {subfolder}/vocab.json")
    settings = folder / subfolder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class", "") if settings.is_file() else "CLIPTokenizer"
    kind: Any = CLIPTokenizer if named.startswith("CLIP") else AutoTokenizer
    return kind.from_pretrained(folder, subfolder=subfolder, local_files_only=True)


def read_json(file: Path) -> dict[str, Any]:
    """A mapping in a file.

    Raises:
        UserError: there is no such file.
    """
    if not file.is_file():
        raise UserError(f"{file}: missing")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, hex; they are read once as long as the file does not change."""
    status = file.stat()
    return _file_digest(file.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """``size`` and ``modified`` (ns) stand for the content, so that a changed file is read again."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
