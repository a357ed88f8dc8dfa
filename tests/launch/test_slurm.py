"""launch/slurm/train.sh under a Slurm that is played here, with real launchers and a real, small run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from slurm import Slurm
from small import assert_as_on_one_process, write_recipe
from started import ROOT, listening, steps

SCRIPT = ROOT / "launch" / "slurm" / "train.sh"


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd: Path) -> Path:
    return write_recipe(tmp_path, tiny_sd, steps=100)


def queue(tmp_path: Path, *arguments: str | Path) -> Slurm:
    """A job whose port, which follows from its number, is free."""
    job = next(number for number in random.sample(range(10000), 100) if not listening(20000 + number))
    return Slurm(tmp_path, SCRIPT, arguments, job)


def test_the_script_is_one_that_bash_and_slurm_read(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    directives = queue(tmp_path, "recipe.yaml").directives
    assert directives["signal"] == "B:USR1@120", "to the script itself, before the time is over"
    assert directives.keys() >= {"nodes", "requeue", "time"} and directives["ntasks-per-node"] == "1"
    assert directives["open-mode"] == "append", "or a job that is queued again writes over its log"


def test_bad_input_is_not_queued_again(recipe: Path, tmp_path: Path) -> None:
    slurm = queue(tmp_path, recipe, "trian.steps=3")
    with slurm.job(os.environ["PATH"], PROCESSES="1") as job:
        assert job.code() == 2, job.said
    assert "did you mean 'train'?" in job.said and slurm.requeued == 0
    with Slurm(tmp_path / "none", SCRIPT, [], 1).job(os.environ["PATH"]) as job:
        assert job.code() == 2 and "usage" in job.said


@pytest.mark.slow
def test_a_job_whose_time_is_over_continues_and_ends_as_one_with_time_enough(recipe: Path, tmp_path: Path) -> None:
    """And in between one of its processes is killed."""
    run, slurm = tmp_path / "run", queue(tmp_path, recipe)
    with slurm.job(os.environ["PATH"], PROCESSES="1") as job:
        job.until(lambda: steps(run) >= 4)
        job.kill(1)
        job.until(lambda: "continuing from" in job.said and steps(run) >= 6)
        job.process.send_signal(signal.SIGUSR1)
        assert job.code() == 3, job.said
    assert "stopped after step" in job.said and slurm.requeued == 1
    stopped = steps(run)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == f"step-{stopped:06d}"
    assert 6 <= stopped < 100
    with slurm.job(os.environ["PATH"], PROCESSES="1") as job:
        assert job.code() == 0, job.said
    assert slurm.requeued == 1, "a run that is done is not queued again"
    assert f"continuing from {run}/checkpoints/step-{stopped:06d}" in job.said
    assert_as_on_one_process(recipe, run, tmp_path)


@pytest.mark.slow
def test_a_crash_after_the_signal_is_tried_once_more_and_one_without_is_not(tmp_path: Path) -> None:
    """A stand-in for the launcher decides how the step ends."""
    for code, told, again in ((0, True, 0), (1, False, 0), (1, True, 1), (2, True, 0), (3, False, 0), (4, True, 0)):
        folder = tmp_path / f"{code}-{told}"
        slurm = Slurm(folder, SCRIPT, ["recipe.yaml"], 1)
        (folder / "bin" / "srun").write_text(
            f"#!/bin/bash\ntrap 'exit {code}' USR1\ntouch {folder}/began\n"
            f"for i in {{1..{600 if told else 5}}}; do sleep 0.1; done\nexit {code}\n"
        )
        with slurm.job(os.environ["PATH"]) as job:
            job.until((folder / "began").exists)
            if told:
                job.process.send_signal(signal.SIGUSR1)
            assert job.code() == code, job.said
        assert slurm.requeued == again, (code, told)
