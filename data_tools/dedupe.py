"""Copies of pictures, found without holding pictures in memory, and moved away with what belongs to them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rich.progress import track

from data_tools.likeness import DISTANCE, Look, alike, copies, look, sharpness
from finetune import files
from finetune.data import captions, decoding
from finetune.errors import UserError

REMEMBERED = 4096  # looks that are kept while candidates are compared


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
    hash: int
    rank: tuple[int, float]  # pixels, sharpness


def find(folder: Path, distance: int = DISTANCE, workers: int = 1) -> tuple[list[Group], list[str]]:
    """Groups of copies in a folder and the folders below it, and what could not be read.

    Args:
        distance: bits in which hashes of copies may differ; 0 finds little more than the same files.
        workers: processes that decode.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in _walk(folder) if decoding.is_picture(path))
    seen: list[_Seen] = []
    kept: list[Path] = []
    problems: list[str] = []
    for path, found in zip(paths, _all(paths, workers), strict=True):
        if isinstance(found, str):
            problems.append(found)
        else:
            seen.append(found)
            kept.append(path)
    again = lru_cache(REMEMBERED)(lambda index: _look(kept[index]))
    found_groups = copies([one.hash for one in seen], lambda a, b: alike(again(a), again(b), distance), distance)
    return [_group(members, kept, seen) for members in found_groups], problems


def move(groups: Sequence[Group], folder: Path, into: Path) -> list[Path]:
    """Move all but the best of each group from ``folder`` to the same places below ``into``, with their captions.

    Nothing is deleted or overwritten: whenever this is interrupted, every file is in one of the two places. Lines of a
    ``metadata.jsonl`` move too.

    Returns:
        where the pictures are now.

    Raises:
        UserError: ``into`` lies within ``folder`` or holds something in a place that is needed, or a CSV file names
            what would be moved; nothing was moved then.
    """
    if into.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--move {into}: lies in {folder}, whose copies would be found again; choose a folder outside")
    moved = {path: None for group in groups for path in group.others}
    moves = [(path, into / path.relative_to(folder)) for one in moved for path in (one, *_beside(one, moved))]
    if taken := [target for _, target in moves if target.exists()]:
        raise UserError(f"{taken[0]}: is there already; choose an empty folder for --move")
    parents = {parent for path in moved for parent in path.parents if parent.is_relative_to(folder)}
    tables = {parent: _lines(parent, moved) for parent in sorted(parents)}
    for source, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        _rename(source, target)
    for parent, (stay, go) in tables.items():
        if go:
            name = captions.METADATA[0]
            files.write_text(into / parent.relative_to(folder) / name, "".join(go))
            files.write_text(parent / name, "".join(stay))
    return [into / path.relative_to(folder) for path in moved]


def _walk(folder: Path) -> Iterator[Path]:
    """All files; links to folders are not followed, so that a loop of them ends."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


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
    return _Seen(look(image).hash, (image.width * image.height, sharpness(image)))


def _look(path: Path) -> Look:
    return look(decoding.rgb(decoding.decode(decoding.read(path), path)))


def _group(members: Sequence[int], paths: Sequence[Path], seen: Sequence[_Seen]) -> Group:
    best = max(members, key=lambda index: (seen[index].rank, -index))
    others = tuple(paths[index] for index in members if index != best)
    same = len({files.sha256(paths[index]) for index in members}) == 1
    return Group(paths[best], others, same)


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
    for line in table.read_text(encoding="utf-8-sig").splitlines(keepends=True):
        (go if _named(line) in names else stay).append(line)
    return stay, go


def _named(line: str) -> str | None:
    try:
        return str(json.loads(line)["file_name"])
    except (ValueError, KeyError, TypeError):
        return None


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # another disk: the copy must be whole before the original goes
        with files.replacing(target) as temporary:
            temporary.write_bytes(source.read_bytes())
        source.unlink()
