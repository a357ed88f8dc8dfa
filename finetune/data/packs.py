"""Packs: safetensors files that hold many entries each, found by name and read through a memory map.

A tensor is called ``<entry>/<label>``, and for every entry a pack's metadata hold the digest of its content and its
labels. A pack appears whole, under a name that no other writer can choose, and is never changed; so any number of
processes, machines and runs may write into one folder. Where several packs hold an entry, the newest counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune import files

Tensors = dict[str, Tensor]

PATTERN = "pack-*.safetensors"
OPEN = 128  # packs that are mapped at a time; an open one costs memory for its header, and no file descriptor
DAY = 86400  # seconds

log = logging.getLogger(__name__)


class Damaged(Exception):
    """An entry is not what was written."""


class Packs:
    """The packs of a folder, which need not exist yet. Nothing is read before it is asked for.

    Args:
        folder: of the packs.

    Attributes:
        checked: entries that are known to be what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checked: set[str] = set()
        self._packs: dict[Path, None] | None = None  # those that are known, None before the first look
        self._where: dict[str, Path] = {}
        self._touched: dict[Path, float] = {}
        self._open = lru_cache(OPEN)(_open)

    def __contains__(self, name: str) -> bool:
        """Whether some pack that is known holds the entry. ``refresh`` finds what others have written."""
        if self._packs is None:
            self.refresh()
        return name in self._where

    def refresh(self) -> int:
        """Learn of packs that have come or gone. Those that cannot be read are removed, and their number returned."""
        there = sorted(self.folder.glob(PATTERN))
        known = self._packs or {}
        if known.keys() - set(there):
            known, self._where = {}, {}  # all are looked at anew
            self._open.cache_clear()
        broken = 0
        for path in there:
            if path not in known:
                broken += self._learn(path)
        self._packs = dict.fromkeys(there)
        return broken

    def read(self, name: str) -> Tensors:
        """An entry, as views of the mapped file; not to be written into. Its digest is checked the first time.

        Raises:
            KeyError: no pack that is known holds it.
            Damaged: it is not what was written, or its pack is gone. It is not known from now on.
        """
        if name not in self:
            raise KeyError(name)
        path = self._where[name]
        try:
            file, facts = self._open(path)
            digest, *labels = facts[name].split()
            entry = {label: file.get_tensor(f"{name}/{label}") for label in labels}
            if name not in self.checked and digest != _digest(entry):
                raise ValueError("its content is not what was written")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            del self._where[name]
            raise Damaged(f"entry {name[:12]}… of {path}: {error}") from error
        self.checked.add(name)
        self._touch(path)
        return entry

    def write(self, entries: Mapping[str, Tensors]) -> Path:
        """Write ``entries`` as a pack.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        path = self.folder / f"pack-{time.time_ns():020}-{uuid.uuid4().hex[:8]}.safetensors"
        tensors = {f"{name}/{label}": tensor for name, entry in entries.items() for label, tensor in entry.items()}
        facts = {name: " ".join([_digest(entry), *sorted(entry)]) for name, entry in entries.items()}
        files.write_tensors(path, tensors, facts)
        if self._packs is not None:
            self._packs[path] = None
            self._where |= dict.fromkeys(entries, path)
            self.checked |= entries.keys()
        return path

    def _learn(self, path: Path) -> int:
        """Take up the entries of a pack; 1 where it was broken and this process is the one that removed it."""
        try:
            _, facts = self._open(path)
        except SafetensorError as error:
            log.warning("%s is damaged (%s): its entries are made again", path, error)
            return _removed(path)
        except OSError as error:
            log.warning("%s cannot be read (%s): its entries are made again", path, error)
            return 0
        self._where |= dict.fromkeys(facts, path)
        self.checked -= facts.keys()
        return 0

    def _touch(self, path: Path) -> None:
        """Leave a mark, once a day, that the pack is in use."""
        now = time.time()
        if now - self._touched.get(path, 0) > DAY:
            self._touched[path] = now
            with contextlib.suppress(OSError):  # of somebody else, perhaps, and only to be read
                os.utime(path)


def unused(folder: Path, days: float) -> list[Path]:
    """Files with tensors below ``folder`` that no run has read or written for ``days``, those of older layouts too."""
    until = time.time() - days * DAY
    return [path for path in sorted(folder.rglob("*.safetensors")) if path.stat().st_mtime < until]


def _open(path: Path) -> tuple[Any, dict[str, str]]:
    """A mapped pack, and what its metadata say of each entry."""
    file = safe_open(path, framework="pt")
    facts = dict(file.metadata() or {})
    facts.pop("format", None)
    return file, facts


def _removed(path: Path) -> int:
    try:
        path.unlink()
    except OSError:
        return 0
    return 1


def _digest(entry: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for label in sorted(entry):
        tensor = entry[label].contiguous()
        digest.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
