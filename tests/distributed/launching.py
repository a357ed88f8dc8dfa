"""Programs started on two processes, as a person starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "launch" / "accelerate"


def launch(launcher: list[str], script: Path, *arguments: str, timeout: float = 600) -> tuple[int, str]:
    """Exit code and output of ``accelerate launch``."""
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=unset, check=False)
    return done.returncode, done.stdout + done.stderr


def alone(script: Path, *arguments: str) -> str:
    """Output of a program on one process, which must succeed."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def profile(name: str, folder: Path) -> list[str]:
    """Options for the launch profile ``name``.

    Under ZeRO-3 a copy in ``folder`` that deals out even the smallest weights: those of toys are all below the size
    from which the shipped one does.
    """
    if not name.startswith("zero3"):
        return ["--config_file", str(PROFILES / f"{name}.yaml")]
    settings = json.loads((ROOT / "launch" / "deepspeed" / f"{name}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / f"{name}.json").write_text(json.dumps(settings))
    text = (PROFILES / f"{name}.yaml").read_text().replace("launch/deepspeed", str(folder))
    (folder / f"{name}.yaml").write_text(text)
    return ["--config_file", str(folder / f"{name}.yaml")]
