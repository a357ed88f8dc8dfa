"""A process that fails, dies, stops or dawdles: all end in time and say why, or all wait and the run is right."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from launching import TOY, alone, launch, profile, toy
from safetensors.torch import load_file

FAULTY = Path(__file__).with_name("faulty_run.py")
SILENCE = 5.0  # seconds, here


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    monkeypatch.setenv("FINETUNE_SILENCE", f"{SILENCE}")


def faulty(folder: Path, name: str, *faults: dict[str, Any], **train: Any) -> tuple[int, str]:
    """A toy run with ``faults`` in ``folder/run``; it must end within a minute of the fault."""
    options = {"faults": list(faults)}
    arguments = toy(folder / "options.json", folder / "run", options, **{"batch_size": 2, **train})
    code, said = launch(profile(name, folder), FAULTY, arguments, timeout=90)
    if (marker := folder / "run.fault").is_file():
        print(f"{name} {faults}: ended {time.time() - float(marker.read_text()):.1f} s after the fault")
    return code, said


def finishes(folder: Path, name: str) -> None:
    """The run in ``folder`` goes on and ends as one that nothing happened to."""
    code, said = faulty(folder, name)
    assert code == 0, said
    alone(TOY, toy(folder / "one.json", folder / "one", batch_size=4))
    ours, theirs = (load_file(folder / run / "adapters" / "toy.safetensors") for run in ("run", "one"))
    assert all(value.sub(theirs[key]).abs().max() < 1e-5 for key, value in ours.items())


PLACES: dict[str, dict[str, Any]] = {
    "step": {"where": "step", "count": 4, "rank": 1},
    "backward": {"where": "backward", "count": 3, "rank": 0},
    "cache": {"where": "cache", "count": 2, "rank": 0},
    "save": {"where": "save", "rank": 0},
    "barrier": {"where": "barrier", "count": 3, "rank": 1},
    "engine": {"where": "engine", "rank": 1},
    "finish": {"where": "finish", "rank": 0},
}
WORDS = {
    "raise": "RuntimeError: out of coffee",
    "missing": "pictures/7.png: there is no such file",
    "kill": "SIGKILL",
    "exit": "exitcode  : 7",
    "stop": f"has said nothing for {SILENCE:.0f} s",
}
FAST = ("cpu-2", "step", "stop")
CELLS = [
    *itertools.product(["cpu-2"], PLACES, ["raise", "kill", "stop"]),
    *itertools.product(["zero2", "zero3"], ["step", "save"], ["raise", "kill", "stop"]),
    *itertools.product(["cpu-2", "zero3"], ["step"], ["exit", "missing"]),
]
SLOW = [pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS if cell != FAST]


@pytest.mark.parametrize(("name", "place", "what"), [FAST, *SLOW])
def test_one_that_fails_ends_all_wherever_it_is(name: str, place: str, what: str, tmp_path: Path) -> None:
    code, said = faulty(tmp_path, name, {**PLACES[place], "what": what})
    assert code != 0
    assert WORDS[what] in said, said
