"""A process dies in the middle: the launchers start all again, and the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import PROFILES, TOY, alone, profile, toy
from safetensors.torch import load_file
from started import LAUNCHER, Started, free_port, listening, started, steps

STEPS = 12


def assert_as_if_nothing_had_happened(output: Path, tmp_path: Path) -> None:
    """Each step is written down once, with the losses and the file of one process that nobody disturbed."""
    one = tmp_path / "one"
    alone(TOY, toy(tmp_path / "one.json", one, batch_size=4, steps=STEPS))
    rows, expected = (
        [(row["step"], row["loss"]) for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        for run in (output, one)
    )
    assert [step for step, _ in rows] == list(range(1, STEPS + 1))
    assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in expected], abs=1e-6)
    ours, theirs = (load_file(run / "adapters" / "toy.safetensors") for run in (output, one))
    assert ours.keys() == theirs.keys()
    assert all(value.allclose(theirs[name], rtol=0, atol=1e-6) for name, value in ours.items())


def disturbed(tmp_path: Path, output: Path, pause: float = 0.3) -> str:
    """A toy run slow enough to be disturbed, with a checkpoint at every second step.

    Args:
        pause: seconds that each step takes.
    """
    path = toy(tmp_path / "toy.json", output, {"pause": pause}, batch_size=2, steps=STEPS)
    change(path, "checkpoint", every=2)
    return path


def change(options: str, section: str, **keys: int) -> None:
    values = json.loads(Path(options).read_text())
    values["recipe"].setdefault(section, {}).update(keys)
    Path(options).write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("cpu-2", 0), ("cpu-2", 1), ("zero2", 1)])
def test_a_killed_process_is_replaced(name: str, rank: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = disturbed(tmp_path, output)
    with started(
        [*LAUNCHER, *profile(name, tmp_path), "--max_restarts", "1", TOY, options], tmp_path / "said"
    ) as running:
        running.until(lambda: steps(output) >= 3)
        running.kill(rank)
        assert running.code() == 0, running.said
    assert "continuing from" in running.said
    assert_as_if_nothing_had_happened(output, tmp_path)


@pytest.mark.slow
def test_two_machines_recover_from_a_killed_process(tmp_path: Path) -> None:
    """One launcher a machine; the one whose process was not killed has to join in.

    It does not count a restart. The processes hear each other all the same, or would end for want of it before the end.
    """
    output = tmp_path / "run"
    options = disturbed(tmp_path, output, pause=2)
    with machines(options, tmp_path) as both:
        both[0].until(lambda: steps(output) >= 3)
        next(machine for machine in both if 1 in machine.ranks()).kill(1)
        for machine in both:
            assert machine.code() == 0, machine.said
    said = both[0].said + both[1].said
    assert said.count("2 processes (DDP, gloo), cpu") == 2 and said.count("continuing from") == 1
    assert_as_if_nothing_had_happened(output, tmp_path)


@pytest.mark.slow
def test_fewer_machines_than_before_do_not_train_on_silently(tmp_path: Path) -> None:
    """Half the pictures a step would be another run: refused with what would keep it the same, which then works."""
    output = tmp_path / "run"
    options = disturbed(tmp_path, output)
    with machines(options, tmp_path) as both:
        both[0].until(lambda: steps(output) >= 3)
        both[0].process.terminate()
        assert both[0].code() == 3, both[0].said
    one = [*LAUNCHER, "--config_file", PROFILES / "cpu.yaml", TOY]
    with started([*one, options], tmp_path / "said") as running:
        assert running.code() == 2
    assert "was trained with 4 pictures a step, here it would be 2" in running.said
    assert "train.gradient_accumulation_steps=2" in running.said
    change(options, "train", gradient_accumulation_steps=2)
    with started([*one, options], tmp_path / "said") as running:
        assert running.code() == 0, running.said
    assert_as_if_nothing_had_happened(output, tmp_path)


@contextlib.contextmanager
def machines(options: str, tmp_path: Path) -> Iterator[tuple[Started, Started]]:
    """Two launchers of one process each that meet at a port."""
    port = free_port()
    command = [*LAUNCHER, "--config_file", PROFILES / "ddp-nodes.yaml", "--num_processes", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_backend", "c10d"]
    command += ["--max_restarts", "2", "--machine_rank"]
    own = {"PET_LOCAL_ADDR": "127.0.0.1", "FINETUNE_SILENCE": "12"}
    with started([*command, "0", TOY, options], tmp_path / "machine 0", **own) as first:
        first.until(lambda: listening(port))
        with started([*command, "1", TOY, options], tmp_path / "machine 1", **own) as second:
            yield first, second
