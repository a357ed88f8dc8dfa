"""A1111's ``.pt`` files: zip archives around a pickle of plain containers and tensors."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from finetune.errors import GuardError
from finetune.files import replacing

_KEPT = re.compile(r"[^/]+/(data\.pkl|version|data/\d+)")


def write_pickle(path: Path, content: Any) -> None:
    """Write ``content`` as torch does, whole or not at all, without what A1111's own check takes for an intruder.

    Current torch adds entries (byte order, alignment, format version) that this check refuses; no reader needs them.
    Equal contents become equal bytes.

    Args:
        content: dictionaries, lists, tuples, numbers, text and CPU tensors; nothing that only code could make again.
    """
    whole = io.BytesIO()
    torch.save(content, whole)
    with replacing(path) as temporary, zipfile.ZipFile(whole) as source, zipfile.ZipFile(temporary, "w") as target:
        for name in source.namelist():
            if found := _KEPT.fullmatch(name):
                target.writestr(zipfile.ZipInfo(f"archive/{found[1]}"), source.read(name))


def check_archive(path: Path) -> str:
    """Whether A1111's own check of a ``.pt`` lets a file pass.

    Raises:
        GuardError: it does not.
    """
    if not zipfile.is_zipfile(path):
        return "of the old form, before torch wrote archives"
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    for name in names:
        if name not in ("data.pkl", "version") and not name.startswith("data/"):
            raise GuardError(f"the archive holds {name!r}, which A1111's check for code refuses")
    return "plain values and tensors, nothing that A1111's check for code refuses"
