"""What a tar holds and where, read from its headers. Nothing is unpacked, so no name can lead anywhere. No torch."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO

from finetune import files
from finetune.data.places import TarMember
from finetune.errors import UserError

VERSION = 1  # of the kept indexes
LONGEST_HEADER = 1 << 20  # bytes; names and attributes take hundreds


def members(shard: Path, cache: Path) -> tuple[list[TarMember], list[str]]:
    """The files in a tar, in its order, and what is wrong with others.

    An index is kept below ``cache`` for as long as the tar's size and time of change stay the same.

    Raises:
        UserError: it is no tar, or a compressed one.
    """
    state = shard.stat()
    key = {"version": VERSION, "path": str(shard.resolve()), "bytes": state.st_size, "changed": state.st_mtime_ns}
    path = cache / "shards" / f"{sha256(json.dumps(key).encode()).hexdigest()}.json"
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError):
        problems: list[str] = []
        found = list(_indexed(shard, state.st_size, problems))
        if not problems:
            files.write_text(path, json.dumps([[one.member, one.offset, one.size] for one in found]))
        return found, problems
    return [TarMember(shard, name, offset, size) for name, offset, size in index], []


def _indexed(shard: Path, size: int, problems: list[str]) -> Iterator[TarMember]:
    last = "its beginning"
    with shard.open("rb") as file:
        _refuse_compressed(shard, file)
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
                while (entry := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                    last = entry.name
                    if entry.size < 0 or entry.offset_data + entry.size > size:
                        raise tarfile.ReadError(f"it is said to have {entry.size} bytes, more than are there")
                    if wrong := _wrong(entry):
                        problems.append(f"{shard}:{entry.name}: {wrong}")
                    elif entry.isreg():
                        yield TarMember(shard, _plain(entry.name), entry.offset_data, entry.size)
                _check_end(file, tar.offset)  # type: ignore[attr-defined]
        except Exception as error:  # tarfile raises whatever a broken file makes it raise
            at = f"{shard}:{last}" if last != "its beginning" else str(shard)
            problems.append(f"{at}: the tar is broken or cut short here: {error}")


class _Headers:
    """A file of which only headers may be read: a hostile one would have gigabytes taken for a member's name."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header is said to have {size} bytes")
        return self.file.read(size)


def _check_end(file: IO[bytes], offset: int) -> None:
    """Tarfile takes a header it cannot read for the end; the real one is a block of zeros with nothing after it."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("no end was found, and no next member")
    if any(file.read(LONGEST_HEADER)):
        raise tarfile.ReadError("it goes on behind its end, as tars do that were joined; keep them apart")


def _refuse_compressed(shard: Path, file: IO[bytes]) -> None:
    begins = file.read(6)
    file.seek(0)
    for magic, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
    ):
        if begins.startswith(magic):
            raise UserError(f"{shard}: is compressed, and members are read in their places; unpack it with {tool}")


def _wrong(entry: tarfile.TarInfo) -> str | None:
    """Why an entry is none that a shard may have."""
    parts = PurePosixPath(entry.name).parts
    if entry.issym() or entry.islnk():
        return f"is a link to {entry.linkname!r}; shards hold files alone"
    if entry.issparse() or not (entry.isreg() or entry.isdir()):
        return "is a device, a pipe or a file with holes; shards hold files alone"
    if not parts and entry.isdir():
        return None  # "./", which tar writes first
    if entry.name.startswith("/") or ".." in parts or not parts:
        return "has a name that leads out of the shard"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in entry.name):
        return "has control characters in its name"
    return None


def _plain(name: str) -> str:
    """``./a/b.png`` as ``a/b.png``."""
    return PurePosixPath(name).as_posix()
