"""Single files that tests change, and what they make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.families import load_family

SingleFile = Callable[..., Path]


def base(path: Path, **settings: Any) -> Any:
    """The family of a single file."""
    return load_family(ModelConfig(path=str(path), **settings))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewritten(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """``file`` with its tensors changed by ``edit``."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)
    return file


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefixes)]:
            del tensors[key]

    return edit
