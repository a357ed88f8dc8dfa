"""Facts of picture files, remembered by content: one that was decoded before is only read and hashed. No torch.

They are kept as packs of lines below the cache folder. A pack is written whole, never changed, and named by the hash of
its own bytes, so that any number of processes may read and write and a damaged one is as good as absent. Only pictures
that are right are remembered: what is wrong with the others is found out again. Small sets leave no trace.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import astuple
from pathlib import Path

import PIL

from finetune import files
from finetune.data import decoding
from finetune.data.ahead import ahead, cores
from finetune.data.decoding import Facts
from finetune.data.places import Place

VERSION = 1
"""Of what ``decoding.facts`` finds."""

LEAST = 100  # new facts that are worth a file
LINES = 10_000  # new facts that are written before a scan has ended
PACKS = 16  # above which they are made one
AHEAD = 8  # files that each thread is ahead

log = logging.getLogger(__name__)


class Known:
    """What is known of pictures already.

    Args:
        cache: folder of a recipe's cache; None remembers nothing.
    """

    def __init__(self, cache: Path | None) -> None:
        self._folder = cache / "facts" / f"{VERSION}-pillow-{PIL.__version__}" if cache else None
        self._facts: dict[str, Facts] = {}
        self._new: list[Facts] = []
        for pack in self._packs():
            self._facts.update((one.sha256, one) for one in _read(pack))

    def look(self, path: Place) -> Facts:
        """What a file holds, decoded only where its content is new.

        Raises:
            UserError: as ``decoding.inspect``.
        """
        content = decoding.read(path)
        sha256 = hashlib.sha256(content).hexdigest()
        found = self._facts.get(sha256)
        if found is None:
            found = self._facts[sha256] = decoding.facts(content, sha256, path)
            self._new.append(found)
        return found

    def look_at_all(self, paths: Iterable[Place], workers: int | None = None) -> Iterator[Future[Facts]]:
        """``look`` of each path, in their order, ahead of whoever takes them; what is new is remembered.

        Args:
            workers: threads that read and decode; as many as this process has cores where it is not set.
        """
        threads = workers or cores()
        try:
            with ThreadPoolExecutor(threads) as pool, closing(ahead(pool, self.look, paths, AHEAD * threads)) as looks:
                for _, found in looks:
                    yield found
                    if len(self._new) >= LINES:
                        self._save()
        finally:
            self._save()
        self._merge()

    def _packs(self) -> list[Path]:
        return sorted(self._folder.glob("*.jsonl")) if self._folder else []

    def _save(self) -> None:
        if len(self._new) >= LEAST and self._folder:
            new, self._new = self._new, []
            _write(self._folder, new)

    def _merge(self) -> None:
        packs = self._packs()
        if self._folder is None or len(packs) <= PACKS:
            return
        merged = _write(self._folder, [one for pack in packs for one in _read(pack)])
        for pack in packs if merged else []:
            if pack != merged:
                with suppress(OSError):
                    pack.unlink()


def _read(pack: Path) -> Iterator[Facts]:
    """The facts of a pack; none where it is damaged, or another process has merged it at this moment."""
    try:
        content = pack.read_bytes()
    except OSError:
        return
    if hashlib.sha256(content).hexdigest() != pack.stem:
        log.warning("%s is damaged; its pictures are decoded again", pack)
        return
    yield from (Facts(*json.loads(line)) for line in content.splitlines())


def _write(folder: Path, some: Iterable[Facts]) -> Path | None:
    """A pack of ``some`` facts; None where the folder cannot be written to, which costs time and nothing else."""
    lines = sorted({json.dumps(astuple(one)) for one in some})
    text = "".join(f"{line}\n" for line in lines)
    pack = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.jsonl"
    try:
        if not pack.is_file():
            files.write_text(pack, text)
    except OSError as error:
        log.info("what is known of pictures is not kept: %s", error)
        return None
    return pack
