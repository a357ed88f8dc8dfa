"""The first pictures of a data set that is passed over once, kept as files, so that each is fetched once.

No torch here, but ``datasets`` loads it for a stream of which something is still to be fetched.
"""

from __future__ import annotations

import io
import itertools
import logging
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from finetune import files
from finetune.config.origin import DatasetConfig
from finetune.data.origins.journal import Journal, kept
from finetune.data.origins.tables import Row, Table, check_columns, picture_bytes, undecoded
from finetune.errors import UserError

log = logging.getLogger(__name__)


def rows(table: Table, dataset: DatasetConfig, cache: Path, at: str) -> Iterator[Row]:
    """The first ``dataset.limit`` rows, those fetched that are not there yet.

    What is kept depends on the path, name, split, revision and columns, and on the state of local files. Interrupted,
    it goes on where it stopped; a larger limit adds to what is there.

    Raises:
        UserError: the data set cannot be opened, or breaks off.
    """
    limit = dataset.limit or 0
    columns = (dataset.image, dataset.text, dataset.mask)
    key = (table.name, table.split, table.revision, columns, _state(table))
    with kept(cache, "streams", table.path, *key) as (folder, journal):
        known, end = _known(journal, folder)
        first = next((number for number in range(min(limit, end)) if number not in known), limit)
        if first < limit:
            _fetch(table, dataset, at, folder, journal, first)
            known, end = _known(journal, folder)
    for number in range(min(limit, end)):
        record = known[number]
        mask = folder / record["mask"] if record["mask"] else None
        yield Row(number, folder / (record["image"] or ""), record["text"], mask, record["wrong"])


def _known(journal: Journal, folder: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """The rows whose files are there, and how many the data set has, as far as that is known."""
    end = sys.maxsize
    known = {}
    for record in journal.records():
        if "end" in record:
            end = record["end"]
        elif all((folder / record[name]).is_file() for name in ("image", "mask") if record[name]):
            known[record["row"]] = record
    return known, end


def _fetch(table: Table, dataset: DatasetConfig, at: str, folder: Path, journal: Journal, first: int) -> None:
    """Keep the rows from ``first`` on."""
    opened = table.open(streaming=True)
    check_columns(opened, dataset, at)
    pictures = [column for column in (dataset.image, dataset.mask) if column]
    limit, number = dataset.limit or 0, first
    log.info("%s: keeping rows %d to %d in %s", table.path, first, limit - 1, folder)
    try:
        for row in itertools.islice(undecoded(opened, *pictures).skip(first), limit - first):
            journal.add(_recorded(row, dataset, table.called(number), folder, number))
            number += 1
    except KeyError as error:
        raise UserError(f"{at}: {table.called(number)} has no column {error}") from None
    except Exception as error:  # of the network, of every format
        there = f"{number} of {limit} rows are kept, and the next run goes on there"
        raise UserError(f"{table.path}: the stream broke off ({type(error).__name__}: {error}); {there}") from None
    if number < limit:
        journal.add({"end": number})


def _recorded(row: Any, dataset: DatasetConfig, where: str, folder: Path, number: int) -> dict[str, Any]:
    """Write the pictures of a row; what the journal says of it."""
    record: dict[str, Any] = {"row": number, "image": None, "mask": None, "text": None, "wrong": None}
    if dataset.text is not None:
        record["text"] = row[dataset.text]
    try:
        for name, column in (("image", dataset.image), ("mask", dataset.mask)):
            if column is not None:
                record[name] = _written(picture_bytes(row[column], column, where), folder, number)
    except UserError as error:
        record["wrong"] = str(error)
    return record


def _written(content: bytes, folder: Path, number: int) -> str:
    """Write a picture; its name in the folder tells the row and the content."""
    name = f"{number // 1000:05d}/{number:08d}-{sha256(content).hexdigest()[:16]}{_suffix(content)}"
    with files.replacing(folder / name) as temporary:
        temporary.write_bytes(content)
    return name


def _suffix(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return f".{(image.format or 'bin').lower()}"
    except Exception:  # what is wrong with it is said with all others' faults, when pictures are decoded
        return ".bin"


def _state(table: Table) -> list[tuple[str, int, int]]:
    """Sizes and times of change of the files that a stream is read from, where they lie on this machine."""
    path = Path(table.path)
    found = [Path(file) for file, _ in table.files] or (path.rglob("*") if path.is_dir() else [])
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.is_file())
