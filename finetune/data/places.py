"""Where the bytes of a picture lie: in a file, within a tar, in a row of a table (``origins.tables``). No torch."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol


class Place(Protocol):
    """Somewhere that bytes can be read from. A ``pathlib.Path`` is one; ``str`` of it is what messages call it.

    Places can be hashed, compared and pickled, and hold no bytes themselves.
    """

    @property
    def name(self) -> str:
        """The last part: "dog.jpg"."""
        ...

    @property
    def stem(self) -> str:
        """The last part without its suffix: "dog"."""
        ...

    @property
    def suffix(self) -> str:
        """From the last dot on: ".jpg"."""
        ...

    def read_bytes(self) -> bytes:
        """All of it.

        Raises:
            OSError: it cannot be read.
            UserError: it holds no bytes.
        """
        ...


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file within an uncompressed tar, read in its place.

    Attributes:
        shard: the tar; one object for all of its members.
        member: its name there.
        offset, size: of its bytes in the tar.
    """

    shard: Path
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.member}"

    @property
    def name(self) -> str:
        """The member's name without folders."""
        return self.member.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Of its name."""
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        """All of it; errors as of ``Place.read_bytes``."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(errno.EIO, f"the tar ends after {len(content)} of {self.size} bytes")
        return content
