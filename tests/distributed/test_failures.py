"""A process that fails, dies, stops or dawdles: all end in time and say why, or all wait and the run is right."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hang_hunt import Case, Hunt
from launching import PROFILES, TOY, alone, launch, profile, toy
from safetensors.torch import load_file

FAULTY = Path(__file__).with_name("faulty_run.py")
PROMISED = 30.0  # seconds in which all end


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")  # of a launcher with those that do not obey it


def ended(marker: Path, what: object) -> None:
    """All must have ended in time after the fault, of which ``marker`` has the moment."""
    seconds = time.time() - float(marker.read_text())
    print(f"{what}: ended {seconds:.1f} s after the fault")
    assert seconds < PROMISED


def faulty(folder: Path, name: str, *faults: dict[str, Any], **train: Any) -> tuple[int, str]:
    """A toy run with ``faults`` in ``folder/run``."""
    arguments = toy(folder / "options.json", folder / "run", {"faults": list(faults)}, **{"batch_size": 2, **train})
    code, said = launch(profile(name, folder), FAULTY, arguments, timeout=240)
    if faults:
        ended(folder / "run.fault", (name, *faults))
    return code, said


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
    "stop": "(SIGSTOP) and is killed",
}
CELLS = [
    *itertools.product(["cpu-2"], PLACES, ["raise", "kill", "stop"]),
    *itertools.product(["zero2", "zero3", "fsdp2"], ["step", "save"], ["raise", "kill", "stop"]),
    *itertools.product(["cpu-2", "zero3", "fsdp2"], ["step"], ["exit", "missing"]),
]


def test_one_that_is_stopped_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_SILENCE", "5")
    code, said = faulty(tmp_path, "cpu-2", {**PLACES["step"], "what": "stop"})
    assert code != 0
    assert WORDS["stop"] in said, said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place", "what"), CELLS)
def test_one_that_fails_ends_all_wherever_it_is(name: str, place: str, what: str, tmp_path: Path) -> None:
    code, said = faulty(tmp_path, name, {**PLACES[place], "what": what})
    assert code != 0
    assert WORDS[what] in said, said


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Hunt:
    return Hunt(tmp_path_factory.mktemp("hunt"))


def dreambooth(hunted: Hunt, folder: Path, name: str, world: int, *faults: dict[str, Any]) -> tuple[int, str]:
    """A run that draws class images and previews."""
    options = hunted.options(Case(0, "prior", name, world, None, None), folder, list(faults))
    return launch([*profile(name, folder), "--num_processes", f"{world}"], FAULTY, options, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "kill", "stop"])
@pytest.mark.parametrize(("place", "rank"), [("class image", 0), ("class image", 1), ("preview", 0)])
def test_one_that_fails_while_it_draws_ends_all(place: str, rank: int, what: str, hunted: Hunt, tmp_path: Path) -> None:
    """Those that have drawn their share wait for the others at a barrier."""
    count = 1 if place == "preview" else 2
    code, said = dreambooth(hunted, tmp_path, "cpu-2", 2, {"where": place, "count": count, "rank": rank, "what": what})
    ended(tmp_path / "run.fault", (place, rank, what))
    assert code != 0 and WORDS[what] in said, said


def machines(folder: Path, fault: dict[str, Any]) -> tuple[int, str]:
    """Two launchers that know each other's address, of one process each: the exit code of that where all is well, and
    what both say.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = toy(folder / "options.json", folder / "run", {"faults": [fault]}, batch_size=2)
    words = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", f"{port}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PROFILES / "ddp-nodes.yaml")]
    started = [
        subprocess.Popen(
            [*command, *words, "--machine_rank", rank, str(FAULTY), options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("1", "0")
    ]
    faulty_one, other = started[1 - fault["rank"]], started[fault["rank"]]
    try:
        told = other.communicate(timeout=240)[0]
        ended(folder / "run.fault", ("two launchers", fault))
        if fault["what"] != "freeze":
            told += faulty_one.communicate(timeout=60)[0]
    finally:
        for one in started:
            for process in [*psutil.Process(one.pid).children(), one] if one.poll() is None else []:
                process.kill()
    return other.returncode, told


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["raise", "kill", "freeze"])
def test_one_that_fails_ends_those_of_another_machine(
    what: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that freezes is missed when it has been silent for long: five minutes, here ten seconds."""
    monkeypatch.setenv("FINETUNE_SILENCE", "10")
    code, said = machines(tmp_path, {"where": "step", "count": 4, "rank": rank, "what": what})
    silent = ("the main process or its machine has said nothing", "nothing has been heard for 10 s of process 1")
    assert code != 0
    assert (silent[rank] if what == "freeze" else WORDS[what]) in said, said


DAWDLE = 65.0  # seconds, longer than the minute after which the main process says who waits


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_slow_in_caching_is_waited_for(rank: int, tmp_path: Path) -> None:
    """Longer than processes have to find each other, here a minute."""
    fault = {"where": "cache", "count": 2, "rank": rank, "what": "slow", "seconds": DAWDLE}
    options = {"faults": [fault], "joining": 60}
    code, said = launch(
        profile("cpu-2", tmp_path), FAULTY, toy(tmp_path / "o.json", tmp_path / "run", options, batch_size=2)
    )
    assert code == 0, said
    assert re.search(rf"rank {1 - rank} waited \d+ s \(barrier\) for process {rank} \(Encoding: 2 of", said), said
    alone(TOY, toy(tmp_path / "one.json", tmp_path / "one", batch_size=4))
    ours, theirs = (load_file(tmp_path / run / "adapters" / "toy.safetensors") for run in ("run", "one"))
    assert all(value.sub(theirs[key]).abs().max() < 1e-5 for key, value in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_one_that_is_slow_in_drawing_is_waited_for(world: int, hunted: Hunt, tmp_path: Path) -> None:
    """In class images and in previews, which is told; there are as many images as were asked for, none twice."""
    slow = {"count": 1, "what": "slow", "seconds": DAWDLE}
    faults = [{**slow, "where": "class image", "rank": 1}, {**slow, "where": "preview", "rank": 0}]
    code, said = dreambooth(hunted, tmp_path, "cpu-2", world, *faults)
    assert code == 0, said
    assert re.search(r"rank 0.* waited \d+ s \(barrier\) for process 1 \(Drawing.*class images", said), said
    assert re.search(r"rank \d.* waited \d+ s \(gather_object\) for process 0 \(drawing picture 1 of", said), said
    images = [path.read_bytes() for path in tmp_path.glob("cache/class-images/*/*.png")]
    assert len(images) == len(set(images)) == 6
