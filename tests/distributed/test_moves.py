"""A run that changes its number of processes and its launch profile on the way ends as if it had never moved."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cells import MATRIX, Setting, assert_same_run, drawn, passes, reference, toys_equal
from launching import TOY, alone, profile, together, toy

Leg = tuple[str | None, int]  # launch profile, processes
ONE: Leg = (None, 1)
NUMBERS: tuple[Leg, ...] = (ONE, ("cpu-2", 2), ("cpu-2", 4), ("cpu-2", 2), ONE)
ENGINES: tuple[Leg, ...] = tuple((name, 2) for name in ("cpu-2", "zero1", "zero2", "zero3", "fsdp2", "cpu-2"))
BOTH: tuple[Leg, ...] = (("zero3", 4), ("fsdp2", 2), ("fsdp2", 4), ("zero2", 4), ONE)
LEGS = (*NUMBERS, *ENGINES, *reversed(ENGINES[:-1]), *BOTH)
PICTURES = 4  # a step
STEPS = 2  # a leg: the others learn of a signal to one process in the step after


def start(leg: Leg, folder: Path, program: Path, options: str) -> tuple[int, str]:
    name, world = leg
    if name is None:
        return 0, alone(program, options, expected=0)
    return together([*profile(name, folder), "--num_processes", str(world)], program, options)


def stop(leg: Leg, step: int, last: int, folder: Path, run: Path) -> None:
    """Train up to ``step``, as ``leg`` says, of ``last``."""
    name, world = leg
    options = {"signal_at": [step - 1, world - 1], "seen": str(folder / f"seen-{step}")}
    path = toy(folder / "leg.json", run, options, batch_size=PICTURES // world, steps=last)
    said = alone(TOY, path, expected=3) if name is None else start(leg, folder, TOY, path)[1]
    assert f"stopped after step {step};" in said, said


def seen(folder: Path, name: str) -> list[list[Any]]:
    """Step, id and draw of all pictures, in order."""
    return sorted(row for path in folder.glob(f"{name}.*.json") for row in json.loads(path.read_text()))


@pytest.mark.slow
def test_a_run_that_moves_all_the_time(tmp_path: Path) -> None:
    assert sum(one != other for one, other in pairwise(LEGS)) >= 12
    last = STEPS * len(LEGS)
    moved, still = tmp_path / "moved", tmp_path / "still"
    for number, leg in enumerate(LEGS[:-1], 1):
        stop(leg, STEPS * number, last, tmp_path, moved)
    for run, name in ((moved, f"seen-{last}"), (still, "alone")):
        options = {"seen": str(tmp_path / name)}
        alone(TOY, toy(tmp_path / "last.json", run, options, batch_size=PICTURES, steps=last))
    toys_equal(moved, still)
    assert seen(tmp_path, "seen-*") == seen(tmp_path, "alone")
    assert len(seen(tmp_path, "alone")) == PICTURES * last


@pytest.mark.slow
def test_a_lora_that_moves(setting: Setting, tmp_path: Path) -> None:
    """With an average, a bound on its norms, class images and previews; four steps, each somewhere else."""
    legs: tuple[Leg, ...] = (("zero3", 4), ("fsdp2", 2), ("cpu-2", 4), ONE)
    run, rows = setting.folder / "moving" / "lora", []
    for steps, leg in enumerate(legs, 1):
        code, said = start(leg, tmp_path, MATRIX, setting.write("moving", ("lora",), leg[1], steps))
        assert code == 0, said
        rows += passes(run, leg[1])
    one = reference(setting, ("lora",)) / "lora"
    assert_same_run(one, run)
    assert drawn(rows) == drawn(passes(one, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero3", "fsdp2"])
def test_a_lora_goes_from_one_process_to_two_and_back(name: str, setting: Setting, tmp_path: Path) -> None:
    for steps, leg in ((2, ONE), (3, (name, 2)), (4, ONE)):
        code, said = start(leg, tmp_path, MATRIX, setting.write(f"back-{name}", ("lora",), leg[1], steps))
        assert code == 0, said
    assert_same_run(reference(setting, ("lora",)) / "lora", setting.folder / f"back-{name}" / "lora")


@pytest.mark.slow
def test_another_number_of_processes_says_what_would_fit(tmp_path: Path) -> None:
    stop(ONE, 2, 4, tmp_path, tmp_path / "run")
    two = "On 2 processes train.batch_size=2 train.gradient_accumulation_steps=1 would do"
    for world, advice in ((2, two), (3, "No values do on 3 processes; take 1, 2 or 4 of them")):
        path = toy(tmp_path / "again.json", tmp_path / "run", batch_size=PICTURES, steps=4)
        code, said = start(("cpu-2", world), tmp_path, TOY, path)
        assert code == 2 and advice in said, said
