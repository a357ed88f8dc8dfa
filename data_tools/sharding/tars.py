"""WebDataset: a tar in which the members of one key follow each other (https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import TracebackType

from data_tools.sharding.samples import Sample


class Tar:
    """A tar that is being written; equal samples give equal bytes, for members have no times and no owners.

    A sample is ``KEY.jpg``, ``KEY.json`` (its name, hash and all of its captions), ``KEY.txt`` (its first caption) and
    perhaps ``KEY.mask.png``.

    Args:
        path: of the file, which is replaced.
        field: the extension of all pictures, whatever their files are: readers look at the bytes, and
            ``datasets`` needs the same members of every sample.
    """

    def __init__(self, path: Path, field: str) -> None:
        self._field = field
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed by ``__exit__``)

    def __enter__(self) -> Tar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def add(self, sample: Sample) -> None:
        """The next sample."""
        told = {"file_name": sample.name, "sha256": sample.sha256, "text": sample.captions}
        self._member(f"{sample.key}.{self._field}", sample.picture)
        self._member(f"{sample.key}.json", json.dumps(told, ensure_ascii=False).encode())
        if sample.mask:
            self._member(f"{sample.key}.mask.png", sample.mask)
        self._member(f"{sample.key}.txt", sample.captions[0].encode())

    def _member(self, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)  # mode 644, time 0, owner 0 without a name
        entry.size = len(content)
        self._tar.addfile(entry, io.BytesIO(content))
        self._tar.members = []  # type: ignore[attr-defined]  # which would keep all of them
