"""Two real processes on the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from launching import PROFILES, TOY, alone, launch, together, toy
from safetensors.torch import load_file

from finetune.config.schema import TrainConfig
from finetune.distributed import start
from finetune.errors import UserError
from finetune.launcher import _split, set_threads, usable_cores

TWO = ["--config_file", str(PROFILES / "cpu-2.yaml")]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_profile_starts_two_that_understand_each_other() -> None:
    code, said = together(TWO, Path(__file__).with_name("processes_run.py"))
    assert code == 0, said
    assert "2 processes (DDP, gloo), cpu" in said
    threads = max(1, usable_cores() // 2)
    assert sorted(re.findall(r"rank \d is content with \d+ threads", said)) == [
        f"rank {rank} is content with {threads} threads" for rank in (0, 1)
    ]


def test_two_processes_train_as_one_does_and_one_can_take_over(tmp_path: Path) -> None:
    """A signal to the second process stops both after one step; a single process then finishes their run."""
    two, one = tmp_path / "two", tmp_path / "one"
    code, said = together(TWO, TOY, toy(tmp_path / "two.json", two, {"signal_at": [4, 1]}, batch_size=2))
    assert code != 0 and "stopped after step 5" in said, said
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step-000005"]
    for output in (one, two):
        alone(TOY, toy(tmp_path / "one.json", output, batch_size=4))
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    ours, theirs = (load_file(output / "adapters" / "toy.safetensors") for output in (one, two))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=1e-5), name


def test_one_bad_picture_stops_both_before_anything_moves(tmp_path: Path) -> None:
    """Draws 12 to 15 are step 4's (from 0: 3); the second process has 14 and 15, which are pictures 0 and 1."""
    code, said = together(TWO, TOY, toy(tmp_path / "o.json", tmp_path / "run", {"nan_at": [3, 1]}, batch_size=2))
    assert code != 0
    message = "the loss of step 4 is not finite on process 1 (0.png, 1.png); nothing was updated"
    assert said.count(message) == 2, said
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.slow
def test_asking_for_two_and_getting_one_is_an_error() -> None:
    code, said = launch(["--cpu", "--num_processes", "2"], Path(__file__).with_name("processes_run.py"))
    assert code != 0
    assert "2 processes asked for, but only 1 started" in said


@pytest.mark.parametrize(
    "words",
    [["--cpu", "--num_processes", "2"], ["--num-processes=2"], ["--cpu", "--config_file", TWO[1]]],
)
def test_the_launchers_command_line_says_what_was_asked_for(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test before, without a launcher: here this process's parent is none."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("finetune.launcher._command_line", lambda _: _split(["accelerate", "launch", *words, "a.py"]))
    with pytest.raises(UserError, match="2 processes asked for, but only 1 started"):
        start(TrainConfig())


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({}, None, usable_cores()),
        ({}, 3, 3),
        ({"OMP_NUM_THREADS": "1"}, None, 1),
        ({"OMP_NUM_THREADS": "1"}, 2, 2),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None, usable_cores()),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None, usable_cores() // 2 or 1),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1000"}, None, 1),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: int | None, expected: int
) -> None:
    """A launcher sets OMP_NUM_THREADS to 1 by itself; a person means it."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        assert set_threads(asked) == expected == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
