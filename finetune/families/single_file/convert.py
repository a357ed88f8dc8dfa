"""From a single file to a diffusers folder, made once and kept."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path

from filelock import FileLock

from finetune.config.schema import ModelConfig
from finetune.families.parts import file_digest
from finetune.families.single_file.checkpoint import Checkpoint, opened, read_checkpoint
from finetune.families.single_file.network import network
from finetune.families.single_file.origin import INDEX
from finetune.families.single_file.template import Template, template
from finetune.files import PARTIAL, model_cache, replacing_folder, stream_tensors

_VERSION = "2"  # of what is written for the same file and template


def converted(config: ModelConfig) -> Path:
    """The diffusers folder that holds what the file ``config.path`` does, in the file's dtype.

    It lies with the hub's models (below ``HF_HOME``) and is named by the file's content and what else decides it, so a
    changed file makes another folder. One process writes it, tensor by tensor, and others wait for it; it is whole or
    not there.

    Raises:
        UserError: the file is of no known architecture, or of other sizes than its settings say, or as ``template``.
    """
    path = Path(config.path).expanduser()
    checkpoint = read_checkpoint(path)
    beside = template(checkpoint, config)
    name = hashlib.sha256(f"{_VERSION} {file_digest(path)} {beside.digest()}".encode()).hexdigest()[:32]
    folder = model_cache() / name
    if not _whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _whole(folder):
                _write(checkpoint, beside, folder)
    return folder


def _whole(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _write(checkpoint: Checkpoint, beside: Template, folder: Path) -> None:
    """Only the holder of the lock comes here, so that what lies there half-written is nobody's."""
    held = [part for part in beside.parts.values() if checkpoint.holds(part.subfolder)]
    networks = [network(checkpoint, beside, part) for part in held]
    for left in folder.parent.glob(f"{PARTIAL}*-{folder.name}"):
        shutil.rmtree(left, ignore_errors=True)
    with replacing_folder(folder) as written, opened(checkpoint.path) as file:
        beside.write(written)
        for part, found in zip(held, networks, strict=True):
            stem = "model" if part.tokenizer else "diffusion_pytorch_model"
            path = written / part.subfolder / f"{stem}.safetensors"
            stream_tensors(path, found.blanks, partial(found.read, file))
