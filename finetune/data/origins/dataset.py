"""A Hugging Face data set, a folder of ``save_to_disk`` or Parquet files as samples. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.config.origin import DatasetConfig, is_url
from finetune.config.schema import ConceptConfig
from finetune.data import captions
from finetune.data.folders import matching, nearest_folder
from finetune.data.origins import mirror, stream
from finetune.data.origins.samples import Finds, Sample
from finetune.data.origins.tables import Cell, Row, Table, check_columns
from finetune.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find(dataset: DatasetConfig, config: ConceptConfig, where: str, cache: Path) -> Finds:
    """A sample for each row, in the order of the rows, called by its number."""
    at = f"{where}.dataset"
    table = _table(dataset, cache, at)
    rows = stream.rows(table, dataset, cache, at) if dataset.streaming else _cells(table, dataset, at)
    finds = Finds([])
    told = config.captions in ("auto", "metadata")
    missing = set(dataset.skip)
    for row in rows:
        if row.number in missing:
            missing.remove(row.number)
            continue
        try:
            if row.wrong:
                raise UserError(row.wrong)
            own = captions.choice(row.text, table.called(row.number)) if told and row.text is not None else ()
            finds.samples.append(Sample(str(row.number), row.picture, own, mask=row.mask))
        except UserError as error:
            finds.problems.append(str(error))
    if missing:
        finds.problems.append(f"{at}.skip: there is no row {min(missing)} among those that are used")
    if not finds.samples and not finds.problems:
        raise UserError(f"{at}: {dataset.path} has no rows in {dataset.split!r}")
    return finds


def _cells(table: Table, dataset: DatasetConfig, at: str) -> Iterator[Row]:
    """Of all rows of a table on this machine; no picture is read."""
    rows = table.open()
    check_columns(rows, dataset, at)
    count = min(len(rows), dataset.limit or len(rows))
    for number, text in enumerate(_texts(rows, dataset.text, count)):
        mask = Cell(table, number, dataset.mask) if dataset.mask else None
        yield Row(number, Cell(table, number, dataset.image), text, mask)


def _texts(rows: Any, column: str | None, count: int) -> Iterator[Any]:
    if column is None:
        yield from [None] * count
        return
    for batch in rows.select_columns([column]).select(range(count)).iter(1000):
        yield from batch[column]


def _table(dataset: DatasetConfig, cache: Path, at: str) -> Table:
    """What a recipe's ``path`` names: Parquet files, something on this machine, or else something on the hub."""
    path = dataset.path
    if path.endswith(".parquet"):
        files = mirror.copies(path, cache, f"{at}.path") if is_url(path) else matching(path)
        if not files:
            raise UserError(f"{at}.path: {path} does not exist{nearest_folder(Path(path))}")
        if dataset.split != "train":
            raise UserError(
                f"{at}.split: is {dataset.split!r}, but Parquet files that are named are all of one split, train"
            )
        ends = tuple(_ends(files))
        if not ends[-1][1]:
            raise UserError(f"{at}: {path} has no rows")
        return Table(path, None, "train", None, ends, cache)
    if is_url(path):
        raise UserError(f"{at}.path: {path} must name Parquet files, such as {path.rstrip('/')}/*.parquet")
    local = Path(path).exists()
    if local and dataset.revision is not None:
        raise UserError(f"{at}.revision: is set, but {path} lies on this machine and has no revisions")
    if not local and not HUB_NAME.fullmatch(path):
        raise UserError(f"{at}.path: {path} does not exist{nearest_folder(Path(path))}")
    return Table(path, dataset.name, dataset.split, dataset.revision, (), cache)


def _ends(files: list[Path]) -> Iterator[tuple[str, int]]:
    """Each file with the number of rows up to its end."""
    import pyarrow.parquet

    end = 0
    for file in files:
        try:
            end += pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: is no Parquet that can be read: {error}") from None
        yield str(file), end
