"""The pictures of a folder and of those below it, a few names at a time, in an order that depends on names alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data import captions, decoding


@dataclass(frozen=True, slots=True)
class Listed:
    """A picture that no byte has been read of.

    Attributes:
        name: path within the folder, with slashes.
        bytes: size of the file.
        captions: those of the metadata; none where they are beside the picture.
    """

    name: str
    bytes: int
    captions: tuple[str, ...] = ()


def kinds(folder: Path, passed: Collection[Path]) -> Counter[str]:
    """How many pictures there are of each suffix, in small letters and without the dot."""
    found: Counter[str] = Counter()
    for _, names in _walk(folder, passed):
        found.update(_kind(name) for name in names if decoding.is_picture(Path(name)))
    return found


def _kind(name: str) -> str:
    kind = name.rpartition(".")[2].lower()
    return {"jpeg": "jpg", "tif": "tiff"}.get(kind, kind)


class Listing:
    """The pictures of a folder, each with its captions of the metadata.

    A folder's own metadata names its pictures and those below it; the nearest has the word. In memory are the names of
    a folder and, of metadata, the captions that are still to come.

    Args:
        passed: folders that are not looked into, resolved.
    """

    def __init__(self, folder: Path, passed: Collection[Path] = ()) -> None:
        self.folder, self.passed = folder, passed
        self.problems: list[str] = []
        """What is wrong with metadata, complete when all pictures have been given."""

    def __iter__(self) -> Iterator[Listed]:
        """All of them, those of a folder before those of the folders below it."""
        tables: list[_Table] = []
        for parent, names in _walk(self.folder, self.passed):
            while tables and tables[-1].folder != parent and tables[-1].folder not in parent.parents:
                self.problems += tables.pop().left()
            if path := captions.metadata_file(parent):
                rows, wrong = captions.read_metadata(path)
                self.problems += wrong
                tables.append(_Table(path, rows))
            for name in names:
                if decoding.is_picture(Path(name)):
                    path = parent / name
                    texts = _named(path, tables)
                    yield Listed(path.relative_to(self.folder).as_posix(), path.stat().st_size, texts)
        while tables:
            self.problems += tables.pop().left()


@dataclass
class _Table:
    path: Path
    rows: dict[str, captions.Row]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def left(self) -> Iterator[str]:
        for name, row in self.rows.items():
            yield f"{self.path}:{row.line}: there is no {name} in the folder"


def _named(path: Path, tables: Sequence[_Table]) -> tuple[str, ...]:
    """The captions that metadata have for a picture; each table is then done with it."""
    rows = [table.rows.pop(path.relative_to(table.folder).as_posix(), None) for table in reversed(tables)]
    return next((row.captions for row in rows if row), ())


def _walk(folder: Path, passed: Collection[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Folders with the sorted names of their files. Links to folders are not followed, so that a loop of them ends."""
    names, below = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            elif entry.is_file():
                names.append(entry.name)
    yield folder, sorted(names)
    for name in sorted(below):
        if (folder / name).resolve() not in passed:
            yield from _walk(folder / name, passed)
