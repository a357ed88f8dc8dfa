"""launch/skypilot/train.yaml: its commands run here as on two rented machines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import assert_as_on_one_process, install, write_recipe
from started import ROOT, free_port, listening, started

TASK: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "skypilot" / "train.yaml").read_text())


def environment(rank: int, gpus: int, **more: Any) -> dict[str, str]:
    """What SkyPilot sets on a machine."""
    return {
        **{name: f"{value}" for name, value in {**TASK["envs"], **more}.items()},
        "SKYPILOT_NUM_NODES": f"{TASK['num_nodes']}",
        "SKYPILOT_NODE_RANK": f"{rank}",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n" * (TASK["num_nodes"] - 1) + "127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": f"{gpus}",
    }


def workdir(folder: Path) -> Path:
    """What ``setup`` leaves behind: an environment with ``finetune`` in it."""
    programs = install(folder / ".venv" / "bin")
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    return folder


def test_the_task_has_what_skypilot_knows_and_names_what_is_there(tmp_path: Path) -> None:
    assert TASK.keys() == {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    assert (ROOT / "launch" / "accelerate" / f"{TASK['envs']['PROFILE']}.yaml").is_file()
    assert TASK["envs"]["RECIPE"].startswith(next(iter(TASK["file_mounts"])))
    target = TASK["setup"].split()[1]
    assert f"\n{target}:" in (ROOT / "Makefile").read_text() and f"{Path(target).parent}/bin/activate" in TASK["run"]


def test_the_command_is_launched_with_the_machines_and_their_gpus(tmp_path: Path) -> None:
    programs = workdir(tmp_path) / ".venv" / "bin"
    (programs / "finetune").write_text('#!/bin/bash\necho "$PET_LOCAL_ADDR" "$@"\n')
    for rank, gpus, processes in ((0, 8, 16), (1, 0, 2)):
        given = {**environment(rank, gpus), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        with started(["bash", "-c", TASK["run"]], tmp_path / f"said-{rank}", tmp_path, **given) as run:
            assert run.code() == 0, run.said
        assert run.said.split()[:3] == [f"10.0.0.{rank + 1}", "train", TASK["envs"]["RECIPE"]]
        assert (
            f"--num_machines 2 --num_processes {processes} --machine_rank {rank} --main_process_ip 10.0.0.1" in run.said
        )


@pytest.mark.slow
def test_two_machines_train_as_one_process(tmp_path: Path, tiny_sd: Path) -> None:
    folder, port = workdir(tmp_path / "workdir"), free_port()
    recipe = write_recipe(tmp_path / "shared", tiny_sd, steps=4)
    with ExitStack() as stack:
        machines = []
        for rank in range(TASK["num_nodes"]):
            given = environment(rank, 0, RECIPE=recipe, PORT=port)
            command = ["bash", "-c", TASK["run"]]
            machine = started(command, tmp_path / f"said-{rank}", folder, **given)
            machines.append(stack.enter_context(machine))
            machines[0].until(lambda: listening(port))
        for launched in machines:
            assert launched.code() == 0, launched.said
    assert "2 processes (DDP, gloo), cpu" in "".join(launched.said for launched in machines)
    assert_as_on_one_process(recipe, tmp_path / "shared" / "run", tmp_path)
