"""Which pictures of a folder want a caption, and why the others are passed over. Loads no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_tools.captioning.pictures import Found, known, metadata, pictures
from finetune.data import captions
from finetune.errors import UserError

Form = Literal["sidecar", "jsonl"]


@dataclass(frozen=True, slots=True)
class Where:
    """A folder of pictures, and where their captions go.

    Attributes:
        folder: of the pictures.
        form: a text file beside each, or ``metadata.jsonl`` of the folder.
        overwrite: caption those too that have a caption.
        recursive: caption those in folders below it too.
        leave_out: a folder below it that holds other things, such as masks.
    """

    folder: Path
    form: Form = "sidecar"
    overwrite: bool = False
    recursive: bool = False
    leave_out: Path | None = None

    def check(self) -> None:
        """Find out beforehand what would go wrong with every picture.

        Raises:
            UserError: there is no such folder, its metadata cannot be read, or lines cannot be added to them.
        """
        next(pictures(self.folder), None)
        metadata.cache_clear()  # captions may have been written since it was read
        _, file = metadata(self.folder)
        if self.form == "jsonl" and file is not None and file.name != captions.METADATA[0]:
            raise UserError(
                f"--out jsonl: {file} holds captions, which a {captions.METADATA[0]} beside it would hide; "
                "use --out sidecar, or move them there"
            )


class Todo:
    """The pictures of ``where`` that want a caption, one after another; one process's share of them.

    The share is every ``world``-th of all pictures, whether they have captions or not, so that processes that look at
    different moments never take the same one, and miss none.

    Attributes:
        wanted: how many were given out so far.
        had: how many had a caption already, of those passed so far.
        refused: sentences about those that can get none.
    """

    def __init__(self, where: Where, rank: int = 0, world: int = 1) -> None:
        self._where, self._rank, self._world = where, rank, world
        self.wanted = self.had = 0
        self.refused: list[str] = []

    def __iter__(self) -> Iterator[Path]:
        where = self._where
        for index, found in enumerate(pictures(where.folder, where.recursive, where.leave_out)):
            if index % self._world == self._rank:
                try:
                    wanted = self._wants(found)
                except UserError as error:
                    self.refused.append(str(error))
                    continue
                if wanted:
                    self.wanted += 1
                    yield found.path
                else:
                    self.had += 1

    def _wants(self, found: Found) -> bool:
        where, path = self._where, found.path
        has = known(path, where.folder)
        in_table = has is not None and has.file.name in captions.METADATA
        if found.twin is not None and where.form == "sidecar" and not in_table:
            text = path.with_suffix(".txt").name
            raise UserError(f"{path}: shares {text} with {found.twin.name}; rename one of them, or use --out jsonl")
        if has is None or not where.overwrite:
            return has is None
        if in_table and where.form == "sidecar":
            raise UserError(f"{path}: its caption is in {has.file}, which counts before a text file; use --out jsonl")
        return True
