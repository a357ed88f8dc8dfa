"""However work is divided, a step sees the same pictures at the same learning rate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import TOY, alone, launch, profile, toy

TOYS = Path(__file__).with_name("toys_run.py")
TOGETHER = 16  # pictures a step
SCHEDULE = {"name": "cosine_with_restarts", "warmup_steps": 3, "cycles": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-2", "zero2"])
def test_the_schedule_counts_updates_whatever_shares_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World 1, 2 and 4 times accumulation 1, 2 and 4: the same rate in every update, to the last bit."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    rates, losses = {}, {}
    for world in (1, 2, 4):
        paths = []
        for parts in (1, 2, 4):
            shared = {"batch_size": TOGETHER // world // parts, "gradient_accumulation_steps": parts}
            run = tmp_path / f"{world}-{parts}"
            paths.append(toy(tmp_path / f"{run.name}.json", run, steps=12, schedule=SCHEDULE, **shared))
        if world == 1:
            alone(TOYS, *paths)
        else:
            code, said = launch([*profile(name, tmp_path), "--num_processes", f"{world}"], TOYS, *paths)
            assert code == 0, said
        for parts in (1, 2, 4):
            lines = (tmp_path / f"{world}-{parts}" / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            rates[world, parts] = [(row["step"], row["learning_rate_first"], row["learning_rate_last"]) for row in rows]
            losses[world, parts] = [row["loss"] for row in rows]
    assert len(rates[1, 1]) == 12 and len({rate for _, rate, _ in rates[1, 1]}) > 8
    assert all(found == rates[1, 1] for found in rates.values()), rates
    assert all(found == pytest.approx(losses[1, 1], abs=1e-6) for found in losses.values()), losses
