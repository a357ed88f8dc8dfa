"""One shard from its pictures, or what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.sharding.listing import Listed
from data_tools.sharding.samples import Sample, check, read
from data_tools.sharding.settings import Record, Settings
from data_tools.sharding.tables import Table
from data_tools.sharding.tars import Tar
from finetune import files
from finetune.errors import UserError


@dataclass(frozen=True)
class Job:
    """A shard that is to be.

    Attributes:
        path: of the shard.
        record: of its record.
        first: number of its first picture among all.
        known: its record, where it was made before.
    """

    path: Path
    record: Path
    first: int
    pictures: tuple[Listed, ...]
    known: Record | None


@dataclass(frozen=True)
class Made:
    """What became of it: a record, or none where it was refused."""

    record: Record | None
    written: bool = False
    problems: tuple[str, ...] = ()


class Maker:
    """Makes shards, in any number of threads.

    Args:
        extension: of all pictures in a tar.

    Attributes:
        only_check: write nothing more. A shard before was refused, and mending it may move the pictures behind it.
    """

    def __init__(self, folder: Path, settings: Settings, extension: str) -> None:
        self.folder, self.settings, self.extension = folder, settings, extension
        self.only_check = False

    def make(self, job: Job) -> Made:
        """A shard that is there and whole as it is, or a new one.

        Raises:
            UserError: it is there already, and was made of something else.
        """
        if job.known and self._unchanged(job, job.known):
            again = tuple(f"{self.folder / name}: is left out, as before" for name in job.known.left_out)
            return Made(job.known, problems=again)
        tally = _Tally()
        try:
            if self.only_check:
                for _ in self._right(job, tally):
                    pass
                return Made(None, problems=tuple(tally.problems))
            with files.replacing(job.path) as temporary:
                self._write(temporary, job, tally)
        except _RefusedError:
            return Made(None, problems=tuple(tally.problems))
        record = tally.record(job.path)
        files.write_json(job.record, asdict(record))
        return Made(record, True, tuple(tally.problems))

    def _write(self, path: Path, job: Job, tally: _Tally) -> None:
        masked = self.settings.masks is not None
        with Tar(path, self.extension) if self.settings.format == "webdataset" else Table(path, masked) as writer:
            for sample in self._right(job, tally):
                writer.add(sample)
        if tally.problems and not self.settings.leave_out:
            raise _RefusedError

    def _right(self, job: Job, tally: _Tally) -> Iterator[Sample]:
        """The pictures of a shard that are right."""
        for sample, listed in self._read(job, tally):
            try:
                check(sample, self.folder)
            except UserError as error:
                tally.refuse(listed, str(error))
            else:
                tally.pictures += 1
                tally.without_caption += sample.captions == ("",)
                yield sample

    def _read(self, job: Job, tally: _Tally) -> Iterator[tuple[Sample, Listed]]:
        """Those that can be read."""
        for number, listed in enumerate(job.pictures, job.first):
            try:
                sample = read(self.folder, listed, f"{number:09}", self.settings.masks)
            except UserError as error:
                tally.refuse(listed, str(error))
            else:
                tally.inputs.update(json.dumps(sample.identity).encode())
                yield sample, listed

    def _unchanged(self, job: Job, known: Record) -> bool:
        """Whether a shard is there and whole. Its pictures are read and hashed, not decoded."""
        tally = _Tally()
        for _ in self._read(job, tally):
            pass
        if tally.inputs.hexdigest() != known.inputs:
            raise changed(self.folder, job.path.parent, f"{job.path.name} was made of other pictures or captions")
        return job.path.is_file() and files.sha256(job.path) == known.sha256


def changed(folder: Path, out: Path, found: str) -> UserError:
    """Shards of two states of a folder must not lie together."""
    return UserError(f"{folder} has changed since {out} was begun: {found}; use another folder, or remove this one")


class _RefusedError(Exception):
    """A picture is broken, so the file that was begun must not stay."""


@dataclass
class _Tally:
    """What is learned of a shard while its pictures pass by."""

    inputs: Any = field(default_factory=hashlib.sha256)
    pictures: int = 0
    without_caption: int = 0
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def refuse(self, listed: Listed, problem: str) -> None:
        self.left_out.append(listed.name)
        self.problems.append(problem)

    def record(self, path: Path) -> Record:
        return Record(
            name=path.name,
            pictures=self.pictures,
            bytes=path.stat().st_size,
            sha256=files.sha256(path),
            without_caption=self.without_caption,
            inputs=self.inputs.hexdigest(),
            left_out=self.left_out,
        )
