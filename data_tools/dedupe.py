"""Copies of pictures, found without holding pictures in memory, and moved away with what belongs to them."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from rich.progress import track

from data_tools.likeness import DIFFERENCE, DISTANCE, SIDE, Look, alike, around, copies, look, sharpness
from finetune import files
from finetune.data import captions, decoding
from finetune.errors import UserError


@dataclass(frozen=True, slots=True)
class Group:
    """Copies of one picture.

    Attributes:
        best: the largest, and of equally large ones the sharpest; it stays.
        others: all the rest.
        same: whether all are the same file, byte for byte.
    """

    best: Path
    others: tuple[Path, ...]
    same: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    look: Look
    pixels: int
    sharpness: float


class _Album:
    """What is kept of each picture: numbers in memory, and the small picture on the disk.

    Args:
        most: pictures that can be added.
    """

    def __init__(self, most: int) -> None:
        self.hashes, self.pixels, self.sharpness, self.means = array("Q"), array("Q"), array("d"), array("d")
        with TemporaryFile() as file:
            self._small = np.memmap(file, np.uint8, "w+", shape=(max(1, most), SIDE, SIDE, 3))

    def add(self, seen: _Seen) -> None:
        """The next picture."""
        self._small[len(self.hashes)] = seen.look.small
        self.means.append(float(seen.look.small.mean()))
        self.hashes.append(seen.look.hash)
        self.pixels.append(seen.pixels)
        self.sharpness.append(seen.sharpness)

    def alike(self, one: int, other: int, distance: int) -> bool:
        """As ``likeness.alike``. Means differ by no more than values do on average, which spares most reading."""
        if abs(self.means[one] - self.means[other]) > DIFFERENCE + 1e-6:
            return False
        first, second = (Look(self.hashes[i], self._small[i].astype(np.int16)) for i in (one, other))
        return alike(first, second, distance)

    def best_first(self, members: Sequence[int]) -> list[int]:
        """The largest, then the sharpest, then in their order."""
        return sorted(members, key=lambda index: (-self.pixels[index], -self.sharpness[index], index))


def find(folder: Path, distance: int = DISTANCE, workers: int = 1) -> tuple[list[Group], list[str]]:
    """Groups of copies in a folder and the folders below it, and what could not be read.

    Every copy is like the best of its group. Links are passed over: what they point at may move.

    Args:
        distance: bits in which hashes of copies may differ; 0 finds little more than the same files.
        workers: processes that decode.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in _walk(folder) if decoding.is_picture(path))
    album = _Album(len(paths))
    kept: list[Path] = []
    problems: list[str] = []
    for path, found in zip(paths, _all(paths, workers), strict=True):
        if isinstance(found, str):
            problems.append(found)
        else:
            album.add(found)
            kept.append(path)

    def certain(one: int, other: int) -> bool:
        return album.alike(one, other, distance)

    chains = copies(album.hashes, certain, distance)
    groups = [group for chain in chains for group in around(album.best_first(chain), certain)]
    return [_group([kept[index] for index in members]) for members in groups], problems


def move(groups: Sequence[Group], folder: Path, into: Path) -> list[Path]:
    """Move all but the best of each group from ``folder`` to the same places below ``into``, with their captions.

    Nothing is deleted or overwritten: whenever this is interrupted, every file is in one of the two places, and finding
    and moving once more completes it. Lines of a ``metadata.jsonl`` move too, before the pictures do, and are added to
    those that are there.

    Returns:
        where the pictures are now.

    Raises:
        UserError: ``into`` lies within ``folder`` or holds something in a place that is needed, or a CSV file names
            what would be moved; nothing was moved then.
    """
    if into.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--move {into}: lies in {folder}, whose copies would be found again; choose a folder outside")
    moved = {path: None for group in groups for path in group.others}
    # text files first, so that a picture that is still there has not left its own behind; two may share one
    sources = dict.fromkeys(path for one in moved for path in (*_beside(one, moved), one))
    moves = {path: into / path.relative_to(folder) for path in sources}
    if taken := [target for target in moves.values() if target.exists()]:
        raise UserError(f"{taken[0]}: is there already; choose an empty folder for --move")
    parents = {parent for path in moved for parent in path.parents if parent.is_relative_to(folder)}
    tables = {parent: _lines(parent, moved) for parent in sorted(parents)}
    for parent, (stay, go) in tables.items():
        if go:
            there = into / parent.relative_to(folder) / captions.METADATA[0]
            _write_lines(there, list(dict.fromkeys([*_read_lines(there), *go])))
            _write_lines(parent / captions.METADATA[0], stay)
    for source, target in moves.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        _rename(source, target)
    return [into / path.relative_to(folder) for path in moved]


def _walk(folder: Path) -> Iterator[Path]:
    """All files but links; links to folders are not followed, so that a loop of them ends."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if not (path := Path(parent) / name).is_symlink())


def _all(paths: Sequence[Path], workers: int) -> Iterator[_Seen | str]:
    with ExitStack() as stack:
        results = (
            map(_see, paths)
            if workers == 1
            else stack.enter_context(ProcessPoolExecutor(workers)).map(_see, paths, chunksize=16)
        )
        yield from track(results, "Looking at pictures", total=len(paths), transient=True)


def _see(path: Path) -> _Seen | str:
    try:
        image = decoding.rgb(decoding.decode(decoding.read(path), path))
    except UserError as error:
        return str(error)
    return _Seen(look(image), image.width * image.height, sharpness(image))


def _group(members: Sequence[Path]) -> Group:
    best, *others = members
    return Group(best, tuple(sorted(others)), len({files.sha256(path) for path in members}) == 1)


def _beside(picture: Path, moved: Collection[Path]) -> list[Path]:
    """The text files of a picture, unless another of the same name needs them."""
    namesakes = (picture.with_suffix(suffix) for one in decoding.SUFFIXES for suffix in (one, one.upper()))
    if any(path not in moved and path.is_file() for path in namesakes):
        return []
    return [path for suffix in captions.SIDECARS if (path := picture.with_suffix(suffix)).is_file()]


def _lines(parent: Path, moved: Collection[Path]) -> tuple[list[str], list[str]]:
    """Lines of a folder's metadata that stay, and those that go with the pictures."""
    names = {path.relative_to(parent).as_posix() for path in moved if path.is_relative_to(parent)}
    stay: list[str] = []
    go: list[str] = []
    table = captions.metadata_file(parent)
    if table is None:
        return stay, go
    rows, _ = captions.read_metadata(table)
    if table.name != captions.METADATA[0]:
        if named := sorted(names & rows.keys()):
            raise UserError(f"{table}:{rows[named[0]].line}: names {named[0]}, which is a copy; remove its line first")
        return stay, go
    for line in _read_lines(table):
        (go if _named(line) in names else stay).append(line)
    return stay, go


def _read_lines(table: Path) -> list[str]:
    """Only a line feed ends a line of JSON; other breaks may stand in a caption."""
    text = table.read_bytes().decode("utf-8-sig") if table.is_file() else ""
    return [line for line in text.split("\n") if line.strip()]


def _write_lines(table: Path, lines: Sequence[str]) -> None:
    files.write_text(table, "".join(f"{line}\n" for line in lines))


def _named(line: str) -> str | None:
    try:
        return Path(json.loads(line)["file_name"]).as_posix()
    except (ValueError, KeyError, TypeError):
        return None


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # another disk: the copy must be whole before the original goes
        with files.replacing(target) as temporary:
            temporary.write_bytes(source.read_bytes())
        source.unlink()
