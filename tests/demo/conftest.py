from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from exported_methods import write


@pytest.fixture(scope="session")
def exported(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's files; for reading only."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = write(method, tiny_sd, tmp_path_factory.mktemp(method))
        return made[method]

    return make
