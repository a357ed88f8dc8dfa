"""``finetune train --launch``: exit codes, signals and restarts, through real launchers on this machine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launching import PROFILES, TOY, alone, launch, toy
from safetensors.torch import load_file
from started import LAUNCHER, started, steps

CPU, TWO = (["--config_file", str(PROFILES / f"{name}.yaml")] for name in ("cpu", "cpu-2"))

ENDS = """
import os, sys, time
from pathlib import Path
from finetune.config.command import exit_codes
from finetune.errors import GuardError, Stopped, UserError

with open(sys.argv[2], "a") as file:
    file.write("began\\n")
with exit_codes():
    if os.environ.get("RANK", "0") == "1":
        time.sleep(60)  # as in a collective that nobody joins any more
    raise {"user": UserError, "stopped": Stopped, "guard": GuardError, "bug": RuntimeError}[sys.argv[1]]("told so")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A run that ends as its argument says; torch is not loaded."""
    path = tmp_path / "ends.py"
    path.write_text(ENDS)
    return path


@pytest.mark.parametrize(
    ("profile", "end", "code"),
    [
        pytest.param(CPU, "user", 2, id="one process, 2"),
        pytest.param(CPU, "bug", 1, id="one process, 1", marks=pytest.mark.slow),
        pytest.param(TWO, "user", 2, id="two processes, 2", marks=pytest.mark.slow),
        pytest.param(TWO, "stopped", 3, id="two processes, 3", marks=pytest.mark.slow),
        pytest.param(TWO, "guard", 4, id="two processes, 4"),
        pytest.param(TWO, "bug", 1, id="two processes, 1", marks=pytest.mark.slow),
    ],
)
def test_the_launcher_ends_as_the_run_does(
    profile: list[str], end: str, code: int, script: Path, tmp_path: Path
) -> None:
    with started([*LAUNCHER, *profile, script, end, tmp_path / "began"], tmp_path / "said") as running:
        assert running.code() == code, running.said
    assert ("told so" in running.said) and ("Traceback" in running.said) == (end == "bug")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "attempts"), [("user", 2, 1), ("stopped", 3, 1), ("bug", 1, 3)])
def test_only_a_crash_is_tried_again(end: str, code: int, attempts: int, script: Path, tmp_path: Path) -> None:
    options = [*TWO, "--max_restarts", "2"]
    with started([*LAUNCHER, *options, script, end, tmp_path / "began"], tmp_path / "said") as running:
        assert running.code() == code, running.said
    assert (tmp_path / "began").read_text().count("began") == 2 * attempts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "batch_size", "number"),
    [(CPU, 4, signal.SIGINT), (CPU, 4, signal.SIGUSR1), (TWO, 2, signal.SIGTERM), (TWO, 2, signal.SIGUSR1)],
    ids=["one process, SIGINT", "one process, SIGUSR1", "two processes, SIGTERM", "two processes, SIGUSR1"],
)
def test_a_signal_to_the_launcher_stops_the_run_with_a_checkpoint(
    profile: list[str], batch_size: int, number: signal.Signals, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = toy(tmp_path / "toy.json", output, {"pause": 0.2}, batch_size=batch_size, steps=100)
    with started([*LAUNCHER, *profile, "--max_restarts", "1", TOY, options], tmp_path / "said") as running:
        running.until(lambda: steps(output) >= 2)
        running.process.send_signal(number)
        assert running.code() == 3, running.said
    assert f"{number.name}: stopped after step" in running.said
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps(output):06d}" != "step-000100"


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_no_failure_of_the_run(tmp_path: Path) -> None:
    loading = tmp_path / "loading.py"
    loading.write_text("import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    for profile in (CPU, TWO):
        there = tmp_path / f"there-{Path(profile[1]).stem}"
        with started([*LAUNCHER, *profile, loading, there], tmp_path / "said") as running:
            running.until(there.exists)
            running.process.send_signal(signal.SIGUSR1)
            assert running.code() == 128 + signal.SIGUSR1, running.said


@pytest.mark.slow
def test_restarts_on_several_machines_need_a_rendezvous_that_forgets_the_dead(script: Path, tmp_path: Path) -> None:
    nodes = ["--config_file", str(PROFILES / "ddp-nodes.yaml"), "--max_restarts", "1"]
    with started([*LAUNCHER, *nodes, script, "user", tmp_path / "began"], tmp_path / "said") as running:
        assert running.code() == 2
    assert "needs --rdzv_backend c10d" in running.said


@pytest.mark.slow
def test_what_accelerate_refuses_is_bad_input(script: Path, tmp_path: Path) -> None:
    options = ["--config_file", str(PROFILES / "ddp.yaml"), "--multi_gpu", "--num_processes", "1"]
    with started([*LAUNCHER, *options, script, "user", tmp_path / "began"], tmp_path / "said") as running:
        assert running.code() == 2
    assert "accelerate launch: You need to use at least 2 processes" in running.said and "Traceback" not in running.said


@pytest.mark.slow
def test_both_launchers_and_one_process_give_the_same_run(tmp_path: Path) -> None:
    """``finetune.launch`` is ``accelerate launch``: losses and files to the byte."""
    for name in ("ours", "theirs"):
        options = toy(tmp_path / f"{name}.json", tmp_path / name, batch_size=2)
        if name == "theirs":
            code, said = launch(TWO, TOY, options)
            assert code == 0, said
        else:
            with started([*LAUNCHER, *TWO, TOY, options], tmp_path / "said") as running:
                assert running.code() == 0, running.said
    alone(TOY, toy(tmp_path / "one.json", tmp_path / "one", batch_size=4))
    rows = {}
    for name in ("ours", "theirs", "one"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line)["loss"] for line in lines]
    assert rows["ours"] == rows["theirs"] == pytest.approx(rows["one"], abs=1e-6)
    ours, theirs, one = (tmp_path / name / "adapters" / "toy.safetensors" for name in ("ours", "theirs", "one"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert all(value.allclose(load_file(one)[key], rtol=0, atol=1e-5) for key, value in load_file(ours).items())
