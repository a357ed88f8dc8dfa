"""Captions: read from the files beside the pictures, and chosen for a draw. No torch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config.wording import WordingConfig
from finetune.data.decoding import read
from finetune.data.places import Place
from finetune.data.wording import worded
from finetune.errors import UserError, nearest
from finetune.randomness import derive

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
LONGEST = 20_000  # characters; no text encoder reads a tenth of it

Lines = Literal["join", "choose", "first"]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a metadata file, or a row of a Parquet one, both from 1: the captions of one picture."""

    line: int
    captions: tuple[str, ...]


def draw(
    captions: Sequence[str],
    seed: int,
    sample_id: str,
    number: int,
    dropout: float = 0.0,
    wording: WordingConfig | None = None,
    step: int = 0,
) -> str:
    """The caption of one draw of a picture, a pure function of its arguments.

    Args:
        captions: those of the picture, of which one is chosen.
        seed: the run's.
        sample_id: the picture's.
        number: of the draw in the endless order.
        dropout: share of draws that see the empty caption.
        wording: what is done to a caption that is not dropped.
        step: the optimizer step of the draw.
    """
    if chance(seed, "caption dropout", sample_id, number) < dropout:
        return ""
    text = captions[derive(seed, "caption", sample_id, number) % len(captions)]
    if wording is None:
        return text
    return worded(text, wording, lambda purpose: derive(seed, purpose, sample_id, number), step)


def chance(seed: int, purpose: str, sample_id: str, number: int) -> float:
    """A number in [0, 1) for one purpose of one draw."""
    return derive(seed, purpose, sample_id, number) / 2**63


def sidecar(picture: Path) -> Path | None:
    """The text file beside a picture, the first of ``SIDECARS`` that is there."""
    beside = (picture.with_suffix(suffix) for suffix in SIDECARS)
    return next((path for path in beside if path.is_file()), None)


def read_sidecar(text: Place, lines: Lines = "join") -> tuple[str, ...]:
    """The captions in a text file; none where there is nothing in it.

    Args:
        lines: what its lines are: together one caption, a caption each, or nothing but the first.

    Raises:
        UserError: the file is not UTF-8, or no caption.
    """
    content = _decode(read(text), str(text))
    texts = [_tidy(one, str(text)) for one in ([content] if lines == "join" else content.splitlines())]
    own = tuple(one for one in texts if one)
    return own[:1] if lines == "first" else own


def from_name(picture: Place) -> tuple[str, ...]:
    """The caption in a picture's name: ``01_zib-star.png`` is "zib-star"; none where nothing is left.

    As in A1111 the digits and hyphens that it begins with are left out, and then underscores count as spaces.
    """
    text = " ".join(re.sub(r"^[-\d]+\s*", "", picture.stem).replace("_", " ").split())
    return (text,) if text else ()


def metadata_file(folder: Path) -> Path | None:
    """The file with a folder's captions, the first of ``METADATA`` that is there."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_metadata(path: Path) -> tuple[dict[str, Row], list[str]]:
    """The rows of a metadata file by file name, and what is wrong with its other lines.

    A line of ``metadata.jsonl`` is ``{"file_name": "a.png", "text": "a photo of a dog"}``; a list of texts is a choice
    of captions. The columns of ``metadata.csv`` are named in its first line: ``file_name,text``; others may be there.
    ``metadata.parquet`` has the same columns, and ``text`` may hold lists.
    """
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for number, record in _RECORDS[path.suffix](path):
        try:
            name, row = _row(record, number, f"{path}:{number}")
            if name in rows:
                raise UserError(f"{path}:{number}: {name} has a caption on line {rows[name].line} already")
            rows[name] = row
        except UserError as error:
            problems.append(str(error))
    return rows, problems


def _json_records(path: Path) -> Iterator[tuple[int, object]]:
    """The number of each line, and what it holds or why it cannot be read."""
    start = 0
    for number, line in enumerate(read(path).split(b"\n"), 1):
        try:
            if line.strip():
                yield number, json.loads(_decode(line, f"{path}:{number}", start))
        except json.JSONDecodeError as error:
            yield number, UserError(f"{path}:{number}: is not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            yield number, UserError(f"{path}:{number}: is not JSON that can be read: {error}")
        except UserError as error:
            yield number, error
        start += len(line) + 1


def _csv_records(path: Path) -> Iterator[tuple[int, object]]:
    """The number of the line that each record begins on, and what it holds or why it cannot be read."""
    number = 1
    try:
        rows = csv.reader(io.StringIO(_decode(read(path), str(path)), newline=""), strict=True)
        names = next(rows, [])
        _require(names, f"{path}:1: the line that names the columns")
        number = rows.line_num + 1
        for cells in rows:
            if len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif cells:
                yield number, UserError(f"{path}:{number}: has {len(cells)} columns, the first line {len(names)}")
            number = rows.line_num + 1
    except csv.Error as error:
        yield number, UserError(f"{path}:{number}: is not CSV: {error}")
    except UserError as error:
        yield number, error


def _parquet_records(path: Path) -> Iterator[tuple[int, object]]:
    """The number of each row, from 1, and what it holds."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require(table.schema_arrow.names, f"{path}: the table")
            for batch in table.iter_batches(1024, columns=["file_name", "text"]):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        wrong = error if isinstance(error, UserError) else UserError(f"{path}: is no Parquet that can be read: {error}")
        yield number + 1, wrong


_RECORDS = {".jsonl": _json_records, ".csv": _csv_records, ".parquet": _parquet_records}


def _require(names: Iterable[str], where: str) -> None:
    for key in ("file_name", "text"):
        if key not in names:
            raise UserError(f"{where}: has no {key!r}{nearest(key, names)}")


def _row(record: object, number: int, where: str) -> tuple[str, Row]:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected {{"file_name": ..., "text": ...}}, found {json.dumps(record)[:40]}')
    _require(record, where)
    name, text = record["file_name"], record["text"]
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: file_name must be a path inside the folder, found {name!r}")
    return Path(name).as_posix(), Row(number, choice(text, where))


def choice(text: object, where: str) -> tuple[str, ...]:
    """A caption or a list of captions, as a table holds them; empty ones are left out.

    Args:
        where: it stands, for messages.

    Raises:
        UserError: it is neither.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{where}: text must be a caption or a list of captions, found {text!r}")
    return tuple(words for one in texts if (words := _tidy(one, where)))


def _tidy(text: str, where: str) -> str:
    """``text`` on one line.

    Raises:
        UserError: it is no caption: too long, or with characters that no text has.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where}: is {len(text)} characters long; a caption has {LONGEST} at most")
    if (at := text.find("\0")) >= 0:
        raise UserError(f"{where}: holds a NUL character at place {at}, so it is no text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character")
    return " ".join(text.split())


def _decode(content: bytes, where: str, offset: int = 0) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {offset + error.start}"
        raise UserError(f"{where}: is not UTF-8: {found}; save it as UTF-8") from None
