"""A folder of pictures packed in other ways."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.config.schema import DataConfig
from finetune.data.sources import Survey, survey


def tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of named contents."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Files of a folder by name."""
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def records(folder: Path) -> list[dict[str, Any]]:
    """Pictures of a folder as rows with the bytes of their files and their captions."""
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "text": path.with_suffix(".txt").read_text(encoding="utf-8").strip(),
        }
        for path in sorted(folder.glob("*.png"))
    ]


def table(folder: Path) -> Any:
    """The same as a ``Dataset``."""
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "text": Value("string")})
    return Dataset.from_list(records(folder), features=features)


def looked(cache: Path, **concept: Any) -> Survey:
    """What is found in one concept, with what is wrong."""
    data = {"concepts": [concept], "cache": {"folder": str(cache)}}
    return survey(DataConfig.model_validate(data))


def captions_of(found: Survey) -> list[str]:
    return [picture.captions[0] for picture in found.concepts[0].pictures]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
