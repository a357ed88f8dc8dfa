"""A file that says what has been fetched, a line for each thing, so that an interruption loses nothing. No torch."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any


class Journal:
    """Records in the order in which they were written; threads may share it.

    Args:
        path: of the file; a line that was cut off by the end of its writer counts as not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def records(self) -> Iterator[dict[str, Any]]:
        """All that were written."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record

    def add(self, record: dict[str, Any]) -> None:
        """Write one more. What it speaks of must be on the disk already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab") as file:
            file.write(b"\n" + json.dumps(record, default=str).encode())  # first, for the last line may be cut off


@contextmanager
def kept(cache: Path, kind: str, name: str, *key: object) -> Iterator[tuple[Path, Journal]]:
    """A folder for what is fetched from ``name``, and its journal; other processes wait until this one is done.

    Args:
        kind: the folder below ``cache``.
        key: what else decides the content.
    """
    from filelock import FileLock

    bare = re.sub(r"//[^/@]*@", "//", name)  # no passwords in the names of folders
    slug = re.sub(r"[^\w.=-]+", "-", bare).strip("-.")[-60:]
    folder = cache / kind / f"{slug}-{sha256(repr((name, *key)).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield folder, Journal(folder / "fetched.jsonl")
