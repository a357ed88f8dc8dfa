"""A run's recipe without what it says of the machine that it ran on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from finetune.config import Recipe, lock

_URL = re.compile(r"\w+://")


def shareable(recipe: Recipe) -> str:
    """The recipe as YAML, each absolute path as its last part and URLs without passwords and signatures."""
    cleaned = _clean(recipe.model_dump(mode="json"))
    return lock(Recipe.model_validate(cleaned))


def without_place(text: str) -> str:
    """A path's last part where it is absolute, a URL without user and query; any other text as it is."""
    if _URL.match(text):
        parts = urlsplit(text)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return Path(text).name or text if text.startswith(("/", "~")) or Path(text).is_absolute() else text


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return without_place(value) if isinstance(value, str) else value
