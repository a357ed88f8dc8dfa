"""launch/slurm/train.sh under a Slurm that is played here, with real launchers and a real, small run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from slurm import Slurm
from started import ROOT, free_port, started, steps

SCRIPT = ROOT / "launch" / "slurm" / "train.sh"


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (40, 60 * number, 90)).save(pictures / f"{number}.png")
    values = {
        "recipe": "lora",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_sd)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {
            "resolution": 16,
            "concepts": [{"folder": str(pictures), "prompt": "a photo of zib star", "trigger": "zib"}],
            "cache": {"folder": str(tmp_path / "cache")},
        },
        "train": {"steps": 100, "batch_size": 1, "optimizer": {"name": "adamw", "eps": 1e-4}, "threads": 1},
        "checkpoint": {"every": 3},
        "report": {"enabled": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def queue(tmp_path: Path, *arguments: str | Path) -> Slurm:
    """A job whose port, which follows from its number, is free."""
    while not 20000 <= (port := free_port()) < 30000:
        pass
    return Slurm(tmp_path, SCRIPT, arguments, job=port - 20000)


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
    one = tmp_path / "one"
    alone = ["finetune", "train", recipe, f"output={one}", "train.batch_size=2"]
    with started(alone, tmp_path / "said") as running:
        assert running.code() == 0, running.said
    rows, expected = (
        [(row["step"], row["loss"]) for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
        for path in (run, one)
    )
    assert [step for step, _ in rows] == list(range(1, 101))
    assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    files = sorted(path.relative_to(one) for path in one.glob("adapters/**/*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(run / path), load_file(one / path)
        assert all(value.allclose(theirs[name], rtol=0, atol=1e-5) for name, value in ours.items())


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
