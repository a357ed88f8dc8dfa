"""A process that fails, dies, stops or dawdles: all end in time and say why, or all wait and the run is right."""

from __future__ import annotations

import json
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


PLACES = [
    pytest.param({"where": "step", "count": 4, "rank": 1}, id="step"),
    pytest.param({"where": "backward", "count": 3, "rank": 0}, id="backward"),
    pytest.param({"where": "cache", "count": 2, "rank": 0}, id="cache"),
    pytest.param({"where": "save", "rank": 0}, id="save"),
    pytest.param({"where": "barrier", "count": 3, "rank": 1}, id="barrier"),
    pytest.param({"where": "engine", "rank": 1}, id="engine"),
    pytest.param({"where": "finish", "rank": 0}, id="finish"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-2", "zero2", "zero3"])
@pytest.mark.parametrize("what", ["raise", "kill", "stop", "exit", "missing"])
@pytest.mark.parametrize("place", PLACES)
def test_one_that_fails_ends_all_wherever_it_is(place: dict[str, Any], what: str, name: str, tmp_path: Path) -> None:
    code, said = faulty(tmp_path, name, {**place, "what": what})
    if place["where"] == "backward" and name != "cpu-2":
        pytest.skip("DeepSpeed does not call it")
    assert code != 0
    words = {
        "raise": "RuntimeError: out of coffee",
        "missing": "pictures/7.png: there is no such file",
        "kill": "SIGKILL",
        "exit": "exitcode  : 7",
        "stop": f"process {place['rank']} has said nothing for {SILENCE:.0f} s",
    }
    assert words[what] in said, said
