"""Encodings kept by content: a key is the hash of everything that decides an entry, so a stale one is never read.

One that is damaged is as good as absent: it is made again. Every picture and every caption is encoded alone, so that an
encoding does not depend on its neighbours and what is read from the disk equals, bit for bit, what would be computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from safetensors import SafetensorError

from finetune import files
from finetune.data.packs import Damaged, Packs, Tensors
from finetune.data.processes import Processes, told
from finetune.errors import UserError

VERSION = 1
STALE = 600  # seconds after which a temporary file is taken for an interrupted writer's

# A pack is written when it has any of these, so that a build that is killed loses no more.
PACK_BYTES = 64 * 2**20
PACK_ENTRIES = 512
PACK_SECONDS = 60.0

Make = Callable[[], Tensors]
log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What happened to the entries of a store in this process.

    Attributes:
        read: found, and whole.
        made: computed.
        damaged: found, but damaged, and so made again; a pack that cannot be opened counts as one.
    """

    read: int = 0
    made: int = 0
    damaged: int = 0


def remove_stale(folder: Path) -> None:
    """Remove what interrupted writers left below ``folder``, but not what another run may be writing at this moment."""
    for leftover in folder.rglob(f"{files.PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def key(kind: str, **settings: str | int | bool | list[int]) -> str:
    """The name of an entry: a hash over everything that decides its content."""
    text = json.dumps({"kind": kind, "version": VERSION, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Entries by key: on the disk, or else made.

    Args:
        folder: of the entries; None keeps nothing, so that every ``get`` makes its entry.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.counts = Counts()
        self._packs = Packs(folder) if folder else None
        self._waiting: dict[str, Tensors] = {}  # for the next pack
        self._since = 0.0  # when the first of them was made

    def __contains__(self, name: str) -> bool:
        """Whether the entry is on the disk; it may be damaged."""
        return self._packs is not None and name in self._packs

    def get(self, name: str, make: Make) -> Tensors:
        """The entry called ``name`` (a ``key``); ``make`` computes it where it is absent or damaged.

        Raises:
            UserError: what was made cannot be written.
        """
        found = self._read(name)
        if found is None:
            found = self._made(name, make)
            self._write()
        return found

    def fill(self, wanted: Mapping[str, Make], processes: Processes, title: str) -> None:
        """Make what is missing of ``wanted`` and check the rest, so that every process can read all of it.

        The work is shared out among all processes; then, where they do not see the same disk, among those of each
        machine; and in the end a process makes what it still lacks.

        Args:
            title: what a person sees while entries are made.

        Raises:
            UserError: what was made cannot be written.
        """
        self._look()
        there = [name for name in wanted if name in self]
        processes.doing(f"{title}: checking what is there")
        self._fill(there[processes.rank :: processes.world], wanted)
        for turn, of in ((processes.rank, processes.world), (processes.local_rank, processes.local_world), (0, 1)):
            processes.barrier()  # everybody has written
            self._look()
            missing = [name for name in wanted if name not in self]
            processes.barrier()  # nobody writes before everybody has looked
            quiet = processes.rank != 0 or not missing
            mine = told(missing[turn::of], title, processes)
            self._fill(track(mine, title, len(missing[turn::of]), disable=quiet, transient=True), wanted)

    def _fill(self, names: Iterable[str], wanted: Mapping[str, Make]) -> None:
        """Whatever ends it, what was made by then is kept."""
        try:
            for name in names:
                if self._read(name) is None:
                    self._made(name, wanted[name])
                    if self._due():
                        self._write()
        finally:
            self._write()

    def _look(self) -> None:
        if self._packs is not None:
            self.counts.damaged += self._packs.refresh()

    def _read(self, name: str) -> Tensors | None:
        """An entry as it is on the disk; None where there is none that is whole."""
        if self._packs is None or name not in self._packs:
            return None
        first = name not in self._packs.checked
        try:
            found = self._packs.read(name)
        except Damaged as error:
            log.warning("%s: making it again", error)
            self.counts.damaged += 1
            return None
        self.counts.read += first
        return found

    def _made(self, name: str, make: Make) -> Tensors:
        entry = {label: tensor.detach().cpu().contiguous() for label, tensor in make().items()}
        self.counts.made += 1
        if self._packs is not None:
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting[name] = entry
        return entry

    def _due(self) -> bool:
        held = sum(tensor.nbytes for entry in self._waiting.values() for tensor in entry.values())
        old = time.monotonic() - self._since
        return held >= PACK_BYTES or len(self._waiting) >= PACK_ENTRIES or old >= PACK_SECONDS

    def _write(self) -> None:
        entries, self._waiting = self._waiting, {}
        if not entries or self._packs is None:
            return
        try:
            self._packs.write(entries)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder}: cannot be written into ({error}); make room, choose another data.cache.folder, "
                "or turn data.cache.latents and data.cache.text off"
            ) from error
