"""The diffusers folder that a single file is like."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import EMBEDDED, model_folder, on_hub
from finetune.families.single_file.checkpoint import Checkpoint, read_checkpoint

INDEX = "model_index.json"
BESIDE = (".json", ".txt", ".model", ".jinja")
"""Endings of what lies beside weights."""


def origin(checkpoint: Checkpoint) -> Path | None:
    """The folder on this machine that a file's header leads to, by way of the files between, each trained from the
    next.
    """
    said, seen = checkpoint.metadata, {checkpoint.path.resolve()}
    while True:
        base = said.get("finetune.base", "")
        for name in filter(None, (said.get("finetune.like"), base)):
            if found := nearby(name, said.get("finetune.revision")):
                return found
        file = Path(base).resolve()
        if not file.is_file() or file.suffix != ".safetensors" or file in seen:
            return None
        seen.add(file)
        said = read_checkpoint(file).metadata


def nearby(name: str, revision: str | None) -> Path | None:
    """A model's folder, where it need not be fetched."""
    if on_hub(name):
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return None
    return model_folder(ModelConfig(path=name)) if name in EMBEDDED or (Path(name) / INDEX).is_file() else None


def fetched(like: str, revision: str | None, missing: Iterable[str]) -> Path:
    """The folder of ``model.like``; of a hub model all but the weights of networks that are not ``missing``.

    Raises:
        UserError: there is no such folder or hub model.
    """
    if not on_hub(like):
        folder = model_folder(ModelConfig(path=like))
        if not (folder / INDEX).is_file():
            raise UserError(f"model.like: {folder} is no diffusers folder: it has no {INDEX}")
        return folder
    wanted = [*(f"*{suffix}" for suffix in BESIDE), *(f"{subfolder}/*.safetensors" for subfolder in missing)]
    try:
        found = snapshot_download(like, revision=revision, allow_patterns=wanted, ignore_patterns="*.fp16*")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.like: {like!r} is no folder and could not be fetched: {reason}") from error
    return Path(found)
