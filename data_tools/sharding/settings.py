"""What decides shards, and what is written down of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
Format = Literal["webdataset", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the shards beside the pictures.

    Attributes:
        size: most bytes of pictures in a shard, which has one picture at least.
        count: pictures in a shard, in place of ``size``.
        masks: folder of the pictures' masks, which have their names.
        leave_out: leave out what is broken, and name it in the index, in place of refusing all.
    """

    format: Format = "webdataset"
    size: int = 256 * UNITS["MB"]
    count: int | None = None
    masks: Path | None = None
    leave_out: bool = False

    @property
    def suffix(self) -> str:
        """Of the shards' names."""
        return {"webdataset": ".tar", "parquet": ".parquet"}[self.format]

    def plain(self) -> dict[str, Any]:
        """What must stay the same for shards to belong together, for JSON."""
        size = None if self.count else self.size
        return {"format": self.format, "size": size, "count": self.count, "masks": self.masks is not None}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A shard that is whole.

    Attributes:
        bytes, sha256: of its file.
        without_caption: how many of its pictures have none.
        inputs: hash of what it was made of.
        left_out: names of pictures that are broken.
    """

    name: str
    pictures: int
    bytes: int
    sha256: str
    without_caption: int
    inputs: str
    left_out: list[str] = field(default_factory=list)


def parse_size(text: str) -> int:
    """``256MB`` in bytes.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    factor = units.get((found[2] or "B").lower()) if found else None
    if not found or factor is None or float(found[1]) * factor < 1:
        raise UserError(f"--size: {text!r} is no size; expected a number and one of {', '.join(UNITS)}, such as 256MB")
    return int(float(found[1]) * factor)
