"""What processes hold and send is what the formulas say. Takes minutes; ``-s`` shows the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import scaling

pytestmark = pytest.mark.slow
SMALL = 1000  # bytes: numbers that processes agree on, losses and norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "all"
    scaling.write_model(path)
    return path


@pytest.mark.parametrize("name", scaling.LAUNCHES)
def test_each_part_is_within_2_percent_of_its_formula(name: str, folder: Path) -> None:
    rows = scaling.measured(name, folder)
    print(f"\n{scaling.table(rows)}")
    assert len(rows) == len(scaling.RECIPES) * len((*scaling.PARTS, *scaling.WAYS))
    for row in rows:
        assert row.measured == pytest.approx(row.formula, rel=0.02, abs=SMALL), row
    assert any(row.measured > 10**6 for row in rows if row.part == "optimizer")
