"""Tables of pictures, opened by Hugging Face ``datasets``, and their cells as places. No torch.

Pictures stay as their files are (``Image(decode=False)``), and no code of a data set is ever run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.origin import DatasetConfig, is_url
from finetune.data.places import Place
from finetune.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Table:
    """A split of a data set, which every process can open for itself.

    Attributes:
        path: a hub name, or a folder: of pictures, of tables, or written by ``save_to_disk``.
        name, split, revision: as ``datasets.load_dataset`` takes them.
        files: the Parquet files that the table consists of, in place of a path, each with the rows up to its end.
        cache: folder for Arrow tables made of local files.
    """

    path: str
    name: str | None
    split: str
    revision: str | None
    files: tuple[tuple[str, int], ...]
    cache: Path

    def called(self, row: int) -> str:
        """A row as messages name it, from 0: "data/a.parquet: row 3"."""
        first = 0
        for file, end in self.files:
            if row < end:
                return f"{file}: row {row - first}"
            first = end
        return f"{self.path}: row {row}"

    def open(self, streaming: bool = False) -> Any:
        """The ``Dataset``, or the ``IterableDataset`` where it is to be passed over once.

        Local tables are read without a word to the network.

        Raises:
            UserError: there is no such data set or split, or it cannot be read.
        """
        try:
            return self._opened(streaming)
        except Exception as error:  # of the hub, of Arrow, of every format
            said = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.path}: cannot be opened as a dataset: {type(error).__name__}: {said}") from None

    def _opened(self, streaming: bool) -> Any:
        import datasets

        # on the hub's own tables, the library's own cache serves all programs
        how = {"split": self.split, "streaming": streaming}
        local = how if streaming else how | {"cache_dir": str(self.cache / "datasets")}
        if self.files:
            return datasets.load_dataset("parquet", data_files=[file for file, _ in self.files], **local)
        folder = Path(self.path)
        if not folder.exists():
            return datasets.load_dataset(self.path, self.name, revision=self.revision, **how)
        if (folder / "dataset_dict.json").is_file():
            folder = folder / self.split
        if (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            return saved.to_iterable_dataset() if streaming else saved
        return datasets.load_dataset(str(folder), self.name, **local)


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture in a row of a table: a place.

    Attributes:
        table: one object for all of its cells.
        row: from 0.
        column: of pictures.
    """

    table: Table
    row: int
    column: str

    def __str__(self) -> str:
        return self.table.called(self.row)

    @property
    def name(self) -> str:
        """Its row."""
        return f"row {self.row}"

    @property
    def stem(self) -> str:
        """Its row."""
        return self.name

    @property
    def suffix(self) -> str:
        """None: a cell is called nothing."""
        return ""

    def read_bytes(self) -> bytes:
        """All of it; errors as of ``Place.read_bytes``."""
        try:
            value = _column(self.table, self.column)[self.row][self.column]
        except Exception as error:  # Arrow raises whatever a broken file makes it raise
            raise UserError(f"{self}: cannot be read: {error}") from None
        return picture_bytes(value, self.column, str(self))


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of a table holds.

    Attributes:
        number: from 0.
        text: of the column of captions, whatever that is.
        wrong: why it cannot be used.
    """

    number: int
    picture: Place
    text: Any = None
    mask: Place | None = None
    wrong: str | None = None


@functools.lru_cache(maxsize=16)
def _column(table: Table, column: str) -> Any:
    """One column of a table as it is stored, opened once in a process."""
    return undecoded(table.open(), column).select_columns([column])


def undecoded(rows: Any, *columns: str) -> Any:
    """A data set whose ``columns`` give the bytes of files, not pictures decoded by others."""
    from datasets import Image

    for column in columns:
        if isinstance((rows.features or {}).get(column), Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def picture_bytes(value: Any, column: str, where: str) -> bytes:
    """The bytes of a picture as columns hold them.

    Args:
        value: bytes, or a mapping with ``bytes`` and, where these are none, the ``path`` of a file of the data set.
        where: it stands, for messages.

    Raises:
        OSError: the file that it names cannot be read.
        UserError: it is none.
    """
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    if value is None and isinstance(path, str):
        if is_url(path) and not path.rpartition("::")[2].startswith("hf://"):
            raise UserError(f"{where}: the column {column!r} names {path!r}; pictures must lie in the table")
        import fsspec

        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    found = "nothing" if value is None else type(value).__name__
    raise UserError(f"{where}: the column {column!r} has no picture: expected the bytes of a file, found {found}")


def check_columns(rows: Any, dataset: DatasetConfig, where: str) -> None:
    """Refuse a data set without the columns that a recipe names.

    Args:
        where: ``dataset`` is in the recipe, for messages.

    Raises:
        UserError: a column is missing, or cannot hold pictures.
    """
    from datasets import Image, Value

    features = rows.features
    if features is None:  # a stream that says nothing of itself before it is read
        return
    wanted = {"image": dataset.image, "text": dataset.text, "mask": dataset.mask}
    for key, column in ((key, column) for key, column in wanted.items() if column is not None):
        if column not in features:
            without = "; null where there are no captions" if key == "text" else ""
            raise UserError(f"{where}.{key}: there is no column {column!r}{nearest(column, features)}{without}")
        kind = features.get(column)
        bytes_alone = isinstance(kind, Value) and "binary" in kind.dtype
        plain = isinstance(kind, dict) and "bytes" in kind  # as other writers store pictures
        if key != "text" and not (isinstance(kind, Image) or bytes_alone or plain):
            pictures = [name for name, one in features.items() if isinstance(one, Image)]
            others = f"; columns of pictures: {', '.join(pictures)}" if pictures else ""
            raise UserError(f"{where}.{key}: the column {column!r} holds no pictures but {kind}{others}")
