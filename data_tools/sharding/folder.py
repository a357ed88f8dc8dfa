"""The folder of shards: which there will be, which are there, and the index that is written last.

Whenever it is interrupted, the same command goes on: a shard whose record says what the input still says is left alone.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data_tools.sharding.listing import Listed, Listing, kinds
from data_tools.sharding.making import Job, Made, Maker, changed
from data_tools.sharding.settings import Record, Settings
from finetune import files
from finetune.data import decoding
from finetune.data.ahead import ahead, cores
from finetune.data.sources import refuse
from finetune.errors import UserError

INDEX, UNFINISHED = "index.json", ".unfinished"


@dataclass
class Done:
    """What came of it.

    Attributes:
        records: all shards, in their order.
        written: how many of them were not there before.
        problems: everything that was left out.
    """

    records: list[Record] = field(default_factory=list)
    written: int = 0
    problems: list[str] = field(default_factory=list)


def shard(folder: Path, out: Path, settings: Settings, workers: int | None = None) -> Done:
    """Write the pictures of ``folder`` and the folders below it, with captions and masks, to shards in ``out``.

    The same pictures, names, captions and settings give the same bytes, whatever the workers and interruptions.

    Args:
        workers: threads that read, decode and write, each a shard of its own; as many as there are cores where it is
            not set.

    Raises:
        UserError: everything that is broken; or what was begun in ``out`` is of other pictures or settings.
    """
    for name, path in (("", folder), ("--masks: ", settings.masks)):
        if path is not None and not path.is_dir():
            raise UserError(f"{name}{path}: no such folder")
    passed = {path.resolve() for path in (out, settings.masks) if path}
    if folder.resolve() in passed:
        raise UserError(
            f"{folder}: holds the pictures, so neither shards nor masks can be kept there; use another folder"
        )
    found = kinds(folder, passed)
    if not found:
        raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(decoding.SUFFIXES))})")
    listing, maker = Listing(folder, passed), Maker(folder, settings, _extension(found))
    shards, done = _Shards(out, maker), Done()
    threads = workers or cores()
    with (
        Progress(transient=True) as progress,
        ThreadPoolExecutor(threads) as pool,
        closing(ahead(pool, maker.make, shards.jobs(listing), 2 * threads)) as results,
    ):
        bar = progress.add_task(f"Writing {found.total()} pictures", total=found.total())
        for job, made in results:
            _take(made.result(), job, done, maker)
            progress.advance(bar, len(job.pictures))
    refuse([*(done.problems if maker.only_check else []), *listing.problems])
    shards.finish(done.records)
    return done


def _extension(found: Counter[str]) -> str:
    """Of all pictures in tars: the one that most have."""
    return min(found, key=lambda kind: (-found[kind], kind))


def _take(made: Made, job: Job, done: Done, maker: Maker) -> None:
    done.problems += made.problems
    if made.record is None:
        maker.only_check = True
    elif maker.only_check and made.written:  # it was under way when one before it was refused
        job.path.unlink()
        job.record.unlink()
    else:
        done.records.append(made.record)
        done.written += made.written


class _Shards:
    """The shards of a folder, those that are there and those to come.

    Raises:
        UserError: they were begun with other settings.
    """

    def __init__(self, out: Path, maker: Maker) -> None:
        self.out, self.maker = out, maker
        self._told = maker.settings.plain()
        if maker.settings.format == "webdataset":
            self._told["extension"] = maker.extension
        self._known = self._begun()
        files.remove_partial(out)
        if not (out / INDEX).is_file():
            files.write_json(out / UNFINISHED / "settings.json", self._told)

    def _begun(self) -> Mapping[str, Record]:
        index = _json(self.out / INDEX)
        told = index.get("settings") or _json(self.out / UNFINISHED / "settings.json")
        if told and told != self._told:
            name = next(name for name in self._told if self._told[name] != told.get(name))
            raise UserError(
                f"{self.out}: was begun with {name} {told.get(name)!r}, not {self._told[name]!r}; "
                "use another folder, or remove this one"
            )
        kept = [_json(path) for path in self._record("").parent.glob("*.json") if path.name != "settings.json"]
        return {one["name"]: Record(**one) for one in [*index.get("shards", []), *kept]}

    def jobs(self, listing: Listing) -> Iterator[Job]:
        """The pictures of each shard: a function of their names and sizes."""
        first, names = 0, set()
        for number, pictures in enumerate(_split(listing, self.maker.settings)):
            name = f"{number:05}{self.maker.settings.suffix}"
            names.add(name)
            yield Job(self.out / name, self._record(name), first, tuple(pictures), self._known.get(name))
            first += len(pictures)
        if more := sorted(self._known.keys() - names):
            raise changed(listing.folder, self.out, f"{more[0]} is one more than it has now")

    def _record(self, name: str) -> Path:
        return self.out / UNFINISHED / f"{name}.json"

    def finish(self, records: Sequence[Record]) -> None:
        """Everything is there."""
        index = {
            "settings": self._told,
            "pictures": sum(record.pictures for record in records),
            "bytes": sum(record.bytes for record in records),
            "shards": [asdict(record) for record in records],
        }
        if _json(self.out / INDEX) != index:
            files.write_json(self.out / INDEX, index)
        shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)


def _split(listing: Listing, settings: Settings) -> Iterator[list[Listed]]:
    pictures: list[Listed] = []
    held = 0
    for one in listing:
        full = len(pictures) == settings.count if settings.count else held + one.bytes > settings.size
        if pictures and full:
            yield pictures
            pictures, held = [], 0
        pictures.append(one)
        held += one.bytes
    yield pictures


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    return found
