"""Encodings kept by content: a key is the hash of everything that decides an entry, so a stale one is never read.

Entries hold float32 tensors and the hash of their own content. One that is damaged is as good as absent: it is made
again. Every picture and every caption is encoded alone, so that an encoding does not depend on its neighbours and what
is read from the disk equals, bit for bit, what would be computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune import files

VERSION = 1
MEMORY = 2**30  # bytes of entries that a store keeps in memory
STALE = 600  # seconds after which a temporary file is taken for an interrupted writer's

Tensors = dict[str, Tensor]
log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What happened to the entries of a store: read, made, and made again because the file was damaged."""

    read: int = 0
    made: int = 0
    damaged: int = 0


def remove_stale(folder: Path) -> None:
    """Remove what interrupted writers left below ``folder``, but not what another run may be writing at this moment."""
    for leftover in folder.rglob(f"{files.PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE:
                leftover.unlink()


def key(kind: str, **settings: str | int | bool | list[int]) -> str:
    """The name of an entry: a hash over everything that decides its content."""
    text = json.dumps({"kind": kind, "version": VERSION, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Store:
    """Entries by key: in memory as far as there is room, on the disk, or else made.

    Args:
        folder: of the entries; None keeps nothing, so that every ``get`` makes its entry.
        memory: bytes that are kept in memory.
    """

    folder: Path | None
    memory: int = MEMORY
    counts: Counts = field(default_factory=Counts)
    _held: dict[str, Tensors] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The entry called ``name`` (a ``key``); ``make`` computes it where it is absent or damaged."""
        if self.folder is None:
            self.counts.made += 1
            return make()
        if name not in self._held:
            entry = self._from_disk(name, make)
            size = sum(tensor.nbytes for tensor in entry.values())
            if self._bytes + size > self.memory:
                return entry
            self._held[name] = entry
            self._bytes += size
        return self._held[name]

    def path(self, name: str) -> Path:
        """Where an entry lies."""
        if self.folder is None:
            raise ValueError("a store without a folder has no files")
        return self.folder / name[:2] / f"{name}.safetensors"

    def _from_disk(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        path = self.path(name)
        if path.is_file():
            try:
                entry = _read(path, name)
            except (SafetensorError, OSError, ValueError) as error:
                log.warning("cache entry %s is damaged (%s): making it again", path, error)
                self.counts.damaged += 1
            else:
                self.counts.read += 1
                return entry
        entry = {label: tensor.detach().cpu().contiguous() for label, tensor in make().items()}
        files.write_tensors(path, entry, {"key": name, "sha256": _digest(entry)})
        self.counts.made += 1
        return entry


def _read(path: Path, name: str) -> Tensors:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        entry = {label: file.get_tensor(label) for label in file.keys()}  # noqa: SIM118  (no mapping)
    if metadata.get("key") != name or metadata.get("sha256") != _digest(entry):
        raise ValueError("its content is not what was written")
    return entry


def _digest(entry: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for label in sorted(entry):
        tensor = entry[label]
        digest.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
