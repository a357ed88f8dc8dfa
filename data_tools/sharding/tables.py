"""Parquet with a column of pictures, as ``datasets`` reads and the Hugging Face hub shows it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from data_tools.sharding.samples import Sample

GROUP = 100
"""Rows that are held and written together; readers of pictures want few."""


class Table:
    """A Parquet file that is being written; equal samples give equal bytes with the same pyarrow.

    Columns: ``image``, ``text`` (the first caption), ``captions`` (all of them), ``sha256`` of the picture, and perhaps
    ``mask``. The features of ``datasets`` are in its metadata, so that ``load_dataset`` gives pictures and no bytes.

    Args:
        path: of the file, which is replaced.
        masked: whether samples have masks.
    """

    def __init__(self, path: Path, masked: bool) -> None:
        from pyarrow import parquet

        self._schema, self._rows = _schema(masked), list[dict[str, object]]()
        small = ["text", "captions.list.element", "sha256"]  # pictures are compressed already
        compression = {name: "zstd" if name in small else "none" for name in _leaves(self._schema)}
        self._file = parquet.ParquetWriter(path, self._schema, compression=compression, use_dictionary=False)

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
        self._file.close()

    def add(self, sample: Sample) -> None:
        """The next sample."""
        row: dict[str, object] = {
            "image": {"bytes": sample.picture, "path": sample.name},
            "text": sample.captions[0],
            "captions": list(sample.captions),
            "sha256": sample.sha256,
        }
        if sample.mask:
            row["mask"] = {"bytes": sample.mask, "path": sample.name}
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._write()

    def _write(self) -> None:
        import pyarrow

        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, self._schema), row_group_size=GROUP)
        self._rows = []


def _schema(masked: bool) -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    columns = {"image": Image(), "text": text, "captions": List(text), "sha256": text}
    return Features(columns | ({"mask": Image()} if masked else {})).arrow_schema


def _leaves(schema: Any) -> list[str]:
    """The columns as Parquet has them, each of one plain type."""
    from pyarrow import types

    found = []
    for column in schema:
        if types.is_struct(column.type):
            found += [f"{column.name}.{part.name}" for part in column.type]
        else:
            found.append(f"{column.name}.list.element" if types.is_list(column.type) else column.name)
    return found
