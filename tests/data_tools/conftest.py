"""Models that caption, made once; for reading only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_captioners as tiny

WRITERS: dict[str, Callable[[Path], Path]] = {
    "blip": tiny.write_blip,
    "blip-2 opt": tiny.write_blip2,
    "blip-2 t5": lambda path: tiny.write_blip2(path, "t5"),
    "florence2": tiny.write_florence2,
    "llava": tiny.write_llava,
    "clip": tiny.write_clip,
    "siglip": lambda path: tiny.write_clip(path, "siglip"),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a kind of ``WRITERS``."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = WRITERS[kind](tmp_path_factory.mktemp("captioners") / kind.replace(" ", "-"))
        return made[kind]

    return make
