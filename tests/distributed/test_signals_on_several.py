"""Signals to one process or to all, at random times, twice: one valid checkpoint, one step, the documented exit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import TOY, alone, profile, toy
from safetensors.torch import load_file

from finetune.train import checkpoint

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
STEPS = 40
CASES = [(name, first, to) for name in ("cpu-2", "zero2") for first in SIGNALS for to in (0, 1, 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no signal came to."""
    folder = tmp_path_factory.mktemp("whole")
    alone(TOY, toy(folder / "o.json", folder / "run", batch_size=4, steps=STEPS))
    return folder / "run"


def workers(launcher: int) -> list[psutil.Process]:
    """The processes of a run, by rank."""
    found = [one for one in psutil.Process(launcher).children(recursive=True) if "RANK" in one.environ()]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("name", "first", "to"), CASES)
def test_a_signal_leaves_one_checkpoint(
    name: str, first: str, to: int, twice: bool, whole: Path, tmp_path: Path
) -> None:
    """``to`` is a rank, or 2 for both. The second signal comes while the first is being obeyed."""
    rng = random.Random(f"{name} {first} {to} {twice}")
    run, log = tmp_path / "run", tmp_path / "log.txt"
    options = toy(tmp_path / "o.json", run, {"pause": 0.1}, batch_size=2, steps=STEPS)
    command = [sys.executable, "-m", "accelerate.commands.launch", *profile(name, tmp_path), str(TOY), options]
    with log.open("w") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=dict(os.environ))
    until = time.monotonic() + 120
    while "step 1/" not in log.read_text():
        assert time.monotonic() < until and launcher.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(2 * rng.random())
    told = workers(launcher.pid) if to == 2 else workers(launcher.pid)[to : to + 1]
    for number in [first, *([rng.choice(SIGNALS)] if twice else [])]:
        for worker in told:
            worker.send_signal(getattr(signal, number))
        time.sleep(0.1 * rng.random())
    assert launcher.wait(60) != 0
    said = log.read_text()
    assert set(re.findall(r"exitcode  ?: (\d+)", said)) == {"3"}, said
    steps = set(re.findall(r"stopped after step (\d+)", said))
    assert len(steps) == 1, said
    (left,) = (run / "checkpoints").iterdir()
    assert left == checkpoint.newest(run / "checkpoints") and int(left.name[5:]) == int(steps.pop())
    alone(TOY, toy(tmp_path / "o.json", run, batch_size=4, steps=STEPS))
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
    ours, theirs = (load_file(path / "adapters" / "toy.safetensors") for path in (run, whole))
    assert all(value.sub(theirs[key]).abs().max() < 1e-5 for key, value in ours.items())
