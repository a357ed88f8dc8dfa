"""Programs started on two processes, as a person starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "train" / "toy_run.py"
PROFILES = ROOT / "launch" / "accelerate"


def launch(launcher: list[str], script: Path, *arguments: str, timeout: float = 600) -> tuple[int, str]:
    """Exit code and output of ``accelerate launch``."""
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=unset, check=False)
    return done.returncode, done.stdout + done.stderr


def together(launcher: list[str], script: Path, *arguments: str, timeout: float = 600) -> tuple[int, str]:
    """Exit code and output of the processes that ``accelerate launch`` would start, in a tenth of the time."""
    return warm.run(list(warm.told(launcher)), script, arguments, timeout)


def alone(script: Path, *arguments: str, expected: int = 0) -> str:
    """Output of a program on one process, which must end with the ``expected`` exit code."""
    code, said = warm.run([os.environ], script, arguments, 600)
    assert code == expected, said
    return said


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


def toy(path: Path, output: Path, options: dict[str, Any] | None = None, **train: Any) -> str:
    """The argument of ``toy_run.py``: a recipe and ``options`` of the toy."""
    recipe = {
        "recipe": "full",
        "output": str(output),
        "adapter": {"kind": "full"},
        "data": {"concepts": [{"folder": "pictures", "prompt": "a photo"}]},
        "train": {"steps": 8, "learning_rate": 0.05, "threads": 1, "ema": {"decay": 0.9}, **train},
    }
    path.write_text(json.dumps({"recipe": recipe, "dropout": 0.0, **(options or {})}))
    return str(path)
