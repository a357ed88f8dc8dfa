"""What lies in a folder of pictures. No torch."""

from __future__ import annotations

import glob
from pathlib import Path

from finetune.data import decoding
from finetune.errors import UserError, nearest


def picture_files(folder: Path, where: str) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder in the order of their names, and its other files and folders.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{where}: {folder} {found}; expected a folder of pictures{nearest_folder(folder)}")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in paths if path.is_file() and decoding.is_picture(path)]
    known = set(pictures)
    return pictures, [path for path in paths if path not in known]


def matching(pattern: str) -> list[Path]:
    """The file that ``pattern`` names, or all that match it, in the order of their names."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    return [found for name in sorted(glob.glob(pattern)) if (found := Path(name)).is_file()]  # noqa: PTH207 (absolute)


def nearest_folder(folder: Path) -> str:
    """A hint at the first part of a missing path that does not exist."""
    for path in (folder, *folder.parents):
        if path.parent.is_dir():
            here = [entry.name for entry in path.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
            return f"; there is no {path.name!r} in {path.parent}{nearest(path.name, here[:20])}"
    return ""
