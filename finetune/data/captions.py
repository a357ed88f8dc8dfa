"""Captions: read from the files beside the pictures, and chosen for a draw. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.decoding import read
from finetune.errors import UserError, nearest
from finetune.randomness import derive

METADATA = "metadata.jsonl"
SIDECARS = (".txt", ".caption")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of ``metadata.jsonl``: the captions of one picture."""

    line: int
    captions: tuple[str, ...]


def draw(captions: Sequence[str], seed: int, sample_id: str, number: int, dropout: float = 0.0) -> str:
    """The caption of one draw of a picture, a pure function of its arguments.

    Args:
        captions: those of the picture, of which one is chosen.
        seed: the run's.
        sample_id: the picture's.
        number: of the draw in the endless order.
        dropout: share of draws that see the empty caption.
    """
    if chance(seed, "caption dropout", sample_id, number) < dropout:
        return ""
    return captions[derive(seed, "caption", sample_id, number) % len(captions)]


def chance(seed: int, purpose: str, sample_id: str, number: int) -> float:
    """A number in [0, 1) for one purpose of one draw."""
    return derive(seed, purpose, sample_id, number) / 2**63


def read_sidecar(picture: Path) -> tuple[str, ...]:
    """The caption in the text file beside a picture; none where there is no file or nothing in it.

    Line breaks count as spaces.

    Raises:
        UserError: the file is not UTF-8.
    """
    for suffix in SIDECARS:
        path = picture.with_suffix(suffix)
        if path.is_file():
            text = " ".join(_decode(read(path), str(path)).split())
            return (text,) if text else ()
    return ()


def read_metadata(path: Path) -> tuple[dict[str, Row], list[str]]:
    """The rows of a ``metadata.jsonl`` by file name, and what is wrong with its other lines.

    A line is ``{"file_name": "a.png", "text": "a photo of a dog"}``; a list of texts is a choice of captions.
    """
    rows: dict[str, Row] = {}
    problems: list[str] = []
    start = 0
    for number, line in enumerate(read(path).split(b"\n"), 1):
        try:
            if line.strip():
                name, row = _row(_decode(line, f"{path}:{number}", start), number, f"{path}:{number}")
                if name in rows:
                    raise UserError(f"{path}:{number}: {name} has a caption on line {rows[name].line} already")
                rows[name] = row
        except UserError as error:
            problems.append(str(error))
        start += len(line) + 1
    return rows, problems


def _row(line: str, number: int, where: str) -> tuple[str, Row]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected {{"file_name": ..., "text": ...}}, found {line.strip()[:40]}')
    for key in ("file_name", "text"):
        if key not in record:
            raise UserError(f"{where}: has no {key!r}{nearest(key, record)}")
    name, text = record["file_name"], record["text"]
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: file_name must be a path inside the folder, found {name!r}")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{where}: text must be a caption or a list of captions, found {text!r}")
    return Path(name).as_posix(), Row(number, tuple(words for one in texts if (words := " ".join(one.split()))))


def _decode(content: bytes, where: str, offset: int = 0) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {offset + error.start}"
        raise UserError(f"{where}: is not UTF-8: {found}; save it as UTF-8") from None
