"""Every launch profile on two real processes of the CPU: each method trains as on one, and runs move between them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import MATRIX, METHODS, Setting, assert_same_run, drawn, losses, passes, reference, toys_equal
from launching import PROFILES, ROOT, TOY, alone, launch, profile, together, toy
from safetensors.torch import load_file, save_file

ENGINE = Path(__file__).with_name("engine_run.py")
FEW = ("lora", "pivotal")
WHOLE = ("cpu-2", "zero1", "zero2", "zero3", "fsdp2")
OFFLOADED = ("zero2-offload", "zero3-offload", "fsdp2-offload")
CELLS = [
    pytest.param("zero2", ("lora",)),
    pytest.param("fsdp2", FEW),
    *(pytest.param(name, tuple(METHODS), marks=pytest.mark.slow) for name in WHOLE),
    *(pytest.param(name, (*FEW, "full"), marks=pytest.mark.slow) for name in OFFLOADED),
]
ENGINES = {
    "cpu-2": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "zero2-offload": "DeepSpeed ZeRO-2",
    "zero3-offload": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
    "fsdp2-offload": "FSDP2",
}


@pytest.mark.parametrize(("name", "methods"), CELLS)
def test_two_processes_train_every_method_as_one_does(
    name: str, methods: tuple[str, ...], setting: Setting, tmp_path: Path
) -> None:
    one, two = reference(setting, methods), setting.folder / name
    code, said = together(profile(name, tmp_path), MATRIX, setting.write(name, methods, 2))
    assert code == 0, said
    assert said.count(f"2 processes ({ENGINES[name]}, gloo), cpu") == len(methods)
    for method in methods:
        assert_same_run(one / method, two / method)
        assert drawn(passes(one / method, 1)) == drawn(passes(two / method, 2))
    if "shapes" in methods:
        ranks = [json.loads((two / f"shapes.{rank}.json").read_text()) for rank in (0, 1)]
        sizes = [[row[1] for row in rows] for rows in ranks]
        assert sizes[0] != sizes[1], "or nothing was shown: both have run the denoiser equally often by chance"
    shutil.rmtree(two)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_a_base_in_half_precision_is_dealt_out_too(name: str, setting: Setting, tmp_path: Path) -> None:
    """Frozen bfloat16 beside float32 that trains, in one block; rounding depends on how many pictures go together."""
    one, two = reference(setting, ("half",)) / "half", setting.folder / name / "half"
    code, said = together(profile(name, tmp_path), MATRIX, setting.write(name, ("half",), 2))
    assert code == 0 and "bf16" in said, said
    assert drawn(passes(one, 1)) == drawn(passes(two, 2))
    for row, again in zip(losses(one), losses(two), strict=True):
        assert row == pytest.approx(again, rel=2e-2)


def stop_at(step: int, path: Path, output: Path) -> None:
    alone(TOY, toy(path, output, {"signal_at": [step, 0]}, batch_size=4), expected=3)


@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        "fsdp2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu-2", "zero1", "zero2", *OFFLOADED[1:])),
    ],
)
def test_what_an_engine_must_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards, averages, written weights and values cut; and a run that moves from one process to two and back."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}:{ROOT}")
    one, moved, uneven = (tmp_path / run for run in ("one", "moved", "uneven"))
    stop_at(2, tmp_path / "t.json", moved)
    alone(TOY, toy(tmp_path / "t.json", uneven, {"every": 2}, steps=2, batch_size=4, ema=None))
    tamper(next((uneven / "checkpoints").iterdir()))
    code, said = together(profile(name, tmp_path), ENGINE, str(tmp_path))
    assert code == 0, said
    assert said.count("is content") == 2
    for output in (one, moved):
        alone(TOY, toy(tmp_path / "t.json", output, batch_size=4))
    toys_equal(moved, one)
    settings = {"max_grad_value": 0.01, "optimizer": {"name": "lion"}, "learning_rate": 0.01, "ema": None}
    alone(TOY, toy(tmp_path / "t.json", tmp_path / "cut", steps=6, batch_size=4, **settings))
    values = json.loads((tmp_path / "values.json").read_text())
    for weight, value in load_file(tmp_path / "cut" / "adapters" / "toy.safetensors").items():
        torch.testing.assert_close(torch.tensor(values[weight]), value, rtol=0, atol=1e-5)


def tamper(checkpoint: Path) -> None:
    """Let one weight have been moved less often than the others."""
    from finetune.files import sha256, write_json

    path = checkpoint / "optimizer.safetensors"
    memory = load_file(path)
    memory["denoiser.first.bias/step"] -= 1
    save_file(memory, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", {**manifest, path.name: sha256(path)})


@pytest.mark.parametrize(
    "name", ["cpu-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp2"))]
)
def test_a_process_that_fails_ends_all_with_its_traceback(name: str, tmp_path: Path) -> None:
    """Started by the launcher itself, as a person does."""
    options = toy(tmp_path / "o.json", tmp_path / "run", {"raise_at": [2, 1]}, batch_size=2)
    code, said = launch(profile(name, tmp_path), TOY, options, timeout=60)
    assert f"2 processes ({ENGINES[name]}, gloo), cpu" in said, said
    assert code != 0 and "RuntimeError: out of coffee" in said and "Traceback" in said
    assert "FutureWarning" not in said, "of a library's, in every run"


def test_every_profile_is_one_that_accelerate_and_deepspeed_read() -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = sorted(PROFILES.glob("*.yaml"))
    assert {path.stem for path in found} >= {"cpu", "single", "ddp", "cpu-2", "zero1", "zero2", "zero3", "ddp-nodes"}
    for path in found:
        config = load_config_from_file(str(path))
        described = getattr(config, "deepspeed_config", None) or {}
        if described:
            settings = json.loads((ROOT / described["deepspeed_config_file"]).read_text())
            stage = DeepSpeedZeroConfig(**settings["zero_optimization"]).stage
            assert f"zero{int(stage)}" in path.stem and described["zero3_init_flag"] is False


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path: Path) -> None:
    """Two launchers that know each other's address, here both on this machine, of one process each."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = toy(tmp_path / "two.json", two, batch_size=2)
    machines = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29517"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PROFILES / "ddp-nodes.yaml")]
    started = [
        subprocess.Popen([*command, *machines, "--machine_rank", rank, str(TOY), options], stdout=subprocess.PIPE)
        for rank in ("1", "0")
    ]
    said = b"".join(process.communicate(timeout=300)[0] for process in started).decode()
    assert all(process.returncode == 0 for process in started)
    assert "2 processes (DDP, gloo), cpu" in said
    alone(TOY, toy(tmp_path / "one.json", one, batch_size=4))
    toys_equal(two, one)
