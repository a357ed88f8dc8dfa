"""launch/kubernetes: the manifests are what the API has, and their command runs here as in two pods."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from small import assert_as_on_one_process, install, write_recipe
from started import ROOT, free_port, listening, started

from finetune.config.command import launch_options

MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "launch" / "kubernetes").glob("*.yaml")}
NAMES = ("pytorchjob", "trainjob")


def machine(name: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Container and pod of a manifest, as the operator puts them together, and how many there are."""
    spec = MANIFESTS[name]["spec"]
    if name == "pytorchjob":
        replicas = spec["pytorchReplicaSpecs"].values()
        first, *others = (replica["template"]["spec"] for replica in replicas)
        assert all(pod == first for pod in others)
        return first["containers"][0], first, sum(replica["replicas"] for replica in replicas)
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod, trainer = job["template"]["spec"]["template"]["spec"], spec["trainer"]
    container = {**trainer, **pod["containers"][0], "resources": trainer["resourcesPerNode"]}
    assert job["name"] == container["name"] == "node", "as the runtime torch-distributed calls them"
    return container, pod, trainer["numNodes"]


def operators(name: str, rank: int, machines: int, port: int) -> dict[str, str]:
    """What the operator sets in the pod of a machine."""
    pet = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}", "NNODES": f"{machines}", "NODE_RANK": f"{rank}"}
    told = {f"PET_{key}": value for key, value in {**pet, "NPROC_PER_NODE": "auto"}.items()}
    if name == "trainjob":
        return told
    plain = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{machines}", "RANK": f"{rank}"}
    return {**told, **plain, "PYTHONUNBUFFERED": "0"}


def expanded(container: Mapping[str, Any], told: Mapping[str, str]) -> list[str]:
    """The command with $(NAME) put in, as Kubernetes does."""
    words = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda found: told[found[1]], word) for word in words]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_asks_for_what_it_launches(name: str) -> None:
    container, pod, machines = machine(name)
    program, verb, recipe, *rest = expanded(container, operators(name, 1, machines, 29500))
    assert (program, verb, recipe) == ("finetune", "train", "recipe.yaml")
    separator = rest.index("--")
    assert rest[:separator] == ["--launch", "ddp-nodes"]
    assert (ROOT / "launch" / "accelerate" / "ddp-nodes.yaml").is_file()
    settings, words = launch_options(rest[separator + 1 :], rest[1])
    options = launch_command_parser().parse_args([*words, "script.py"])
    assert settings == [] and options.training_script == "script.py"
    assert options.num_machines == machines > 1
    assert options.num_processes == machines * container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.machine_rank == 1 and options.main_process_ip == "localhost" and options.main_process_port == 29500
    assert options.rdzv_backend == "c10d" and options.max_restarts > 0
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted == {"work": "/workspace", "memory": "/dev/shm"} and volumes.keys() == mounted.keys()
    assert "claimName" in volumes["work"]["persistentVolumeClaim"]
    assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
    dockerfile = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    assert re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)[1] == f"{pod['securityContext']['runAsUser']}"  # type: ignore[index]
    assert dockerfile.rindex("WORKDIR /workspace\n") > dockerfile.rindex("WORKDIR /opt")


def test_manifests_have_the_keys_that_the_operators_know() -> None:
    assert MANIFESTS.keys() == set(NAMES)
    for job in MANIFESTS.values():
        assert job.keys() == {"apiVersion", "kind", "metadata", "spec"} and job["metadata"]["name"]
    old, new = (MANIFESTS[name] for name in NAMES)
    assert (old["apiVersion"], old["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert old["spec"].keys() <= {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
    policy = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"}
    assert old["spec"]["runPolicy"].keys() <= policy
    replicas = old["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica.keys() == {"replicas", "restartPolicy", "template"} and replica["restartPolicy"] == "OnFailure"
    assert machine("pytorchjob")[0]["name"] == "pytorch", "the container in which the operator sets the environment"
    assert (new["apiVersion"], new["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert new["spec"].keys() == {"runtimeRef", "trainer", "runtimePatches"}
    assert new["spec"]["runtimeRef"]["name"] == "torch-distributed"
    known = {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert new["spec"]["trainer"].keys() <= known
    assert all("env" not in container for container in machine("trainjob")[1]["containers"]), "the API refuses it there"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_pods_train_as_one_process(name: str, tmp_path: Path, tiny_sd: Path) -> None:
    work, port = tmp_path / "work", free_port()
    recipe = write_recipe(work, tiny_sd, steps=4)
    container, _, machines = machine(name)
    path = f"{install(tmp_path / 'bin')}:{os.environ['PATH']}"
    with ExitStack() as stack:
        pods = []
        for rank in range(machines):
            told = operators(name, rank, machines, port)
            own = {"PET_LOCAL_ADDR": "127.0.0.1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "25"}
            assert own.keys() == {variable["name"] for variable in container["env"]}
            command = [*expanded(container, told), f"--num_processes={machines}"]  # here there are no GPUs
            pod = started(command, tmp_path / f"pod-{rank}", work, PATH=path, **told, **own)
            pods.append(stack.enter_context(pod))
            pods[0].until(lambda: listening(port))
        for launched in pods:
            assert launched.code() == 0, launched.said
    assert "2 processes (DDP, gloo), cpu" in "".join(launched.said for launched in pods)
    assert_as_on_one_process(recipe, work / "run", tmp_path)
