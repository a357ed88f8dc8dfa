"""What a plan says of memory is what a run takes. Takes minutes; ``-s`` shows the figures."""

from __future__ import annotations

from pathlib import Path

import memory
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "all"
    memory.write_models(path)
    return path


@pytest.mark.parametrize("name", memory.RECIPES)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(name: str, folder: Path) -> None:
    found = memory.measured(memory.recipe_of(name, folder))
    print(f"\n{name}: {found}")
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.15)
