"""Where captions go: a text file beside each picture, or lines of one file that several processes share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from finetune import files
from finetune.data import captions

TABLE = captions.METADATA[0]
LOCK = f".{TABLE}.lock"
EVERY = 60.0  # seconds


class Writer(Protocol):
    """Keeps captions of pictures."""

    def write(self, picture: Path, caption: str) -> None:
        """Keep ``caption`` now or soon."""
        ...

    def close(self) -> None:
        """Keep all that was written."""
        ...


class Sidecars:
    """``a.txt`` beside ``a.png``. Text that was in it goes to ``a.txt.bak``, or ``a.txt.bak2`` and so on."""

    def write(self, picture: Path, caption: str) -> None:
        """Write it at once."""
        path = picture.with_suffix(".txt")
        if path.is_file() and path.read_bytes().strip():
            files.write_text(_free(path), path.read_text(encoding="utf-8-sig"))
        files.write_text(path, caption + "\n")

    def close(self) -> None:
        """Nothing is left to do."""


class Lines:
    """``metadata.jsonl`` of a folder. Other lines, and other keys of a line, stay as they are.

    Captions are merged into the file once in a while, under a lock, so that processes and other programs that do the
    same lose nothing of each other's. A text that is replaced is kept under the key ``replaced``.

    Args:
        overwrite: whether a line that has a text by then gets the new one.
        every: seconds between merges; a process that is killed loses what it has found since the last.
    """

    def __init__(self, folder: Path, overwrite: bool, every: float = EVERY) -> None:
        self._folder, self._overwrite, self._every = folder, overwrite, every
        self._new: dict[str, str] = {}
        self._merged = time.monotonic()

    def write(self, picture: Path, caption: str) -> None:
        """Remember it, and merge if it is time."""
        self._new[picture.relative_to(self._folder).as_posix()] = caption
        if time.monotonic() - self._merged >= self._every:
            self.close()

    def close(self) -> None:
        """Merge."""
        if self._new:
            table = self._folder / TABLE
            with (
                FileLock(self._folder / LOCK),
                files.replacing(table) as temporary,
                temporary.open("w", encoding="utf-8", newline="\n") as file,
            ):
                file.writelines(f"{line}\n" for line in self._lines(table, dict(self._new)))
            self._new = {}
        self._merged = time.monotonic()

    def _lines(self, table: Path, new: dict[str, str]) -> Iterator[str]:
        """The file's lines with what is new. Only a line feed ends a line; other breaks may stand in a caption."""
        if table.is_file():
            with table.open(encoding="utf-8-sig", newline="\n") as file:
                for line in file:
                    if line.strip():
                        yield self._renewed(line.rstrip("\n"), new)
        for name, text in new.items():
            yield json.dumps({"file_name": name, "text": text}, ensure_ascii=False)

    def _renewed(self, line: str, new: dict[str, str]) -> str:
        record: dict[str, Any] = json.loads(line)
        text = new.pop(Path(record["file_name"]).as_posix(), None)
        old = record["text"]
        if text is None or (old and not self._overwrite):
            return line
        if old:
            record["replaced"] = [*record.get("replaced", []), *([old] if isinstance(old, str) else old)]
        return json.dumps({**record, "text": text}, ensure_ascii=False)


class Printed:
    """Captions that are printed and not kept."""

    def write(self, picture: Path, caption: str) -> None:
        """Print it."""
        print(f"{picture}: {caption}", flush=True)

    def close(self) -> None:
        """Nothing is left to do."""


def _free(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}.bak{number if number > 1 else ''}")).exists():
        number += 1
    return found
