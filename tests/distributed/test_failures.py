"""A process that fails, dies, stops or dawdles: all end in time and say why, or all wait and the run is right."""

from __future__ import annotations

import itertools
import json
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
from launching import TOY, alone, launch, profile, toy
from PIL import Image
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rank"),
    [("cache", 0), ("cache", 1), ("class image", 0), ("class image", 1), ("preview", 0), ("preview", 1), ("save", 0)],
)
def test_all_wait_for_one_that_is_slow(place: str, rank: int, tmp_path: Path, tiny_sd: Path, pictures: Path) -> None:
    """Twice as long as silence may last and longer than the processes had to find each other."""
    fault = {"where": place, "rank": rank, "what": "slow", "seconds": 2.4 * SILENCE}
    values = dreambooth(tmp_path / "run", tiny_sd, pictures, tmp_path / "cache")
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"recipe": values, "faults": [fault], "joining": 2 * SILENCE}))
    code, said = launch(profile("cpu-2", tmp_path), FAULTY, str(path), timeout=240)
    assert code == 0 and (tmp_path / "run.fault").is_file(), said


@pytest.mark.slow
def test_a_minute_of_work_of_one_is_waited_for_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process is busy for 65 s; what was its timeout until the processes had met is 20 s."""
    monkeypatch.delenv("FINETUNE_SILENCE")
    options = {"faults": [{"where": "save", "rank": 0, "what": "slow", "seconds": 65}], "joining": 20}
    arguments = toy(tmp_path / "options.json", tmp_path / "run", options, batch_size=2)
    code, said = launch(profile("cpu-2", tmp_path), FAULTY, arguments, timeout=240)
    assert code == 0, said
    assert re.search(r"rank 1 waited 6\d s \(broadcast\) for process 0 \(writing the checkpoint of step 8\)", said), (
        said
    )


def dreambooth(
    output: Path, model: Path, pictures: Path, cache: Path, world: int = 2, **sections: Any
) -> dict[str, Any]:
    """A recipe of four steps that draws class images and previews; four pictures a step."""
    concept = {
        "folder": str(pictures),
        "prompt": "a photo of zib star",
        "class_prompt": "a photo of a star",
        "trigger": "zib",
    }
    return {
        "recipe": "dreambooth",
        "output": str(output),
        "model": {"path": str(model)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(cache)}},
        "prior": {"kind": "images", "count": 7, "sampler": {"steps": 1}, "batch_size": 2},
        "samples": {"every": 2, "sampler": {"steps": 1}, "prompts": ["a zib star", "a star", "zib"]},
        "train": {"steps": 4, "batch_size": 4 // world, "learning_rate": 1e-3, "threads": 1},
        "report": {"enabled": False},
        **sections,
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (24, 24), (50 * number, 90, 30)).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("cpu-2", 2), ("cpu-2", 4), ("zero3", 4)])
def test_class_images_and_previews_are_shared(
    name: str, world: int, tmp_path: Path, tiny_sd: Path, pictures: Path
) -> None:
    """Seven class images by twos on two and four processes: each drawn once, the same files as of one process."""
    runs = {}
    for ranks in (1, world):
        values = dreambooth(tmp_path / f"{ranks}", tiny_sd, pictures, tmp_path / f"cache{ranks}", ranks)
        path = tmp_path / f"{ranks}.json"
        path.write_text(json.dumps({"recipe": values}))
        if ranks == 1:
            alone(FAULTY, str(path))
        else:
            options = [*profile(name, tmp_path), "--num_processes", f"{ranks}"]
            code, said = launch(options, FAULTY, str(path), timeout=300)
            assert code == 0, said
        drawn = (tmp_path / f"cache{ranks}").glob("class-images/*/*.png")
        previews = (tmp_path / f"{ranks}" / "samples").glob("*/*.png")
        runs[ranks] = [{file.name: file.read_bytes() for file in sorted(drawn)}, sorted(file.name for file in previews)]
    calls = [int(count) for count in re.findall(r"class image: (\d+) calls", said)]
    assert sum(calls) == 4 and max(calls) == 4 // min(world, 4), f"four pairs are shared evenly: {calls}"
    assert runs[1] == runs[world]
    assert len(runs[1][0]) == 7 and len(set(runs[1][0].values())) == 7


@pytest.mark.slow
def test_a_port_that_is_in_use_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        options = [*profile("cpu-2", tmp_path), "--main_process_port", f"{port}"]
        code, said = launch(options, TOY, toy(tmp_path / "o.json", tmp_path / "run", batch_size=2), timeout=60)
    assert code != 0 and f"port `{port}`" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [("raise", "process 1 has failed:\nTraceback"), ("freeze", f"process 1 has said nothing for {SILENCE:.0f} s")],
)
def test_a_machine_hears_why_another_is_gone(what: str, words: str, tmp_path: Path) -> None:
    """Two launchers on this one: what the first prints is what its machine's log would hold."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    fault = {"where": "step", "count": 3, "rank": 1, "what": what}
    options = toy(tmp_path / "o.json", tmp_path / "run", {"faults": [fault]}, batch_size=2)
    machines = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", f"{port}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *profile("ddp-nodes", tmp_path), *machines]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, str(FAULTY), options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = started[0].communicate(timeout=120)[0].decode()
        assert started[0].returncode != 0 and words in said, said
    finally:
        for process in started:
            for one in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                one.kill()
            process.kill()
