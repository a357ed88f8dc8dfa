"""How often processes talk in an update: once for gradients, once for losses, and never between."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import TOY, profile, together

COUNTED = Path(__file__).with_name("collectives_run.py")


def counts(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, int]]]:
    """Calls of each micro-step, of both processes."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    code, said = together(profile(name, folder), COUNTED, str(folder), timeout=120)
    assert code == 0, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_gradients_travel_once_an_update_and_losses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten megabytes in 42 tensors, two micro-steps: torch's own buckets would have gone in several calls."""
    for steps in counts("cpu-2", tmp_path, monkeypatch):
        assert steps[0] == {} and steps[1] == {"c10d::allgather_": 1, "c10d::allreduce_": 1}
        assert steps[2] == {"c10d::broadcast_": 2}, "DDP agrees on the order of gradients, once"
        assert steps[3:] == [{"c10d::allgather_": 1, "c10d::allreduce_": 1} if n % 2 else {} for n in range(3, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_zero_talks_equally_often_in_every_update(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients once a micro-step in stage 2, which keeps a piece of their sum; then norms, twice weights, losses."""
    for steps in counts(name, tmp_path, monkeypatch):
        ends = steps[3::2]
        assert all(one == ends[0] for one in ends) and ends[0]["c10d::allreduce_"] <= 4, ends
        assert ends[0]["c10d::_allgather_base_"] == 2, "one for each group of weights"
        assert all(sum(one.values()) <= 1 for one in steps[2::2]), steps
