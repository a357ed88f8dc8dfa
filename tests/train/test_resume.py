"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from safetensors.torch import load_file
from toy_run import ToyBatches, build, recipe

from finetune.errors import Stopped, UserError
from finetune.train.fitting import _advice
from finetune.train.trainer import Trainer

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "average": {"ema": {"decay": 0.9}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "lion": {"optimizer": {"name": "lion"}, "learning_rate": 0.01},
    "adafactor": {"optimizer": {"name": "adafactor", "beta1": 0.9}},
    "came": {"optimizer": {"name": "came"}},
    "prodigy": {"optimizer": {"name": "prodigy", "d0": 1e-3}, "learning_rate": 1.0},
    "schedulefree": {"optimizer": {"name": "schedulefree", "r": 1.0}, "schedule": {"warmup_steps": 3}},
    "muon": {"optimizer": {"name": "muon"}},
    "a class": {"optimizer": {"name": "torch.optim.ASGD", "options": {"t0": 2.0}}},
    "warmup_stable_decay": {"schedule": {"name": "warmup_stable_decay", "warmup_steps": 2, "decay_share": 0.4}},
    "schedule": {"schedule": {"name": "cosine", "warmup_steps": 3}},
    "rates": {"schedule": {"rates": "0.05:4, 0.01:8, 0.002"}, "max_grad_value": 0.01},
    "bfloat16": {"mixed_precision": "bf16"},
    "all": {
        "gradient_accumulation_steps": 2,
        "ema": {"decay": 0.9},
        "schedule": {"name": "linear"},
        "mixed_precision": "bf16",
    },
}


def train(trainer: Trainer, until: int | None = None) -> list[tuple[str, ...]]:
    """Run, or break off after step ``until``; returns the pictures seen."""
    batches = ToyBatches(trainer.recipe, trainer.processes)
    for batch in trainer.steps(batches):
        trainer.update(batch)
        if trainer.step == until:
            break
    return batches.seen


def state(output: Path, step: int) -> dict[str, bytes]:
    folder = output / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(output: Path) -> list[dict[str, float]]:
    timed = ("seconds", "samples_per_second", "peak_memory")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_three_interruptions_change_no_bit(tmp_path: Path, case: str) -> None:
    """Weights, average, optimizer, losses and pictures; each interruption loses the steps after the checkpoint."""
    settings = {"steps": 9, "every": 2, **CASES[case]}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(build(recipe(whole, **settings))[0])
    for until in (3, 5, 8):
        train(build(recipe(broken, **settings))[0], until)
    seen = train(build(recipe(broken, **settings))[0])
    assert seen == expected[-len(seen) :]
    assert state(broken, 9) == state(whole, 9)
    assert lines(broken) == lines(whole)


def test_the_optimizer_state_is_under_the_names_of_the_parameters(tmp_path: Path) -> None:
    train(build(recipe(tmp_path / "run", steps=2))[0])
    tensors = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "optimizer.safetensors")
    moments = {"step", "exp_avg", "exp_avg_sq"}
    names = {f"denoiser.{layer}.{part}" for layer in ("first", "last") for part in ("weight", "bias")}
    assert tensors.keys() == {f"{name}/{what}" for name in names for what in moments}


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(build(recipe(whole, every=2))[0])
    train(build(recipe(broken, every=2))[0], until=5)
    damaged = broken / "checkpoints" / "step-000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    train(build(recipe(broken, every=2))[0])
    assert "step-000004 is damaged" in (said := capsys.readouterr().out)
    assert "continuing from" in said and "step-000002" in said
    assert state(whole, 6) == state(broken, 6)


def test_a_finished_run_says_so_and_trains_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = build(recipe(tmp_path / "run"))
    train(trainer)
    weights = trainer.finish()[0].tensors
    again, _ = build(recipe(tmp_path / "run"))
    assert train(again) == []
    assert "already trained" in capsys.readouterr().out
    assert all(torch.equal(value, weights[name]) for name, value in again.finish()[0].tensors.items())


def test_more_steps_continue_and_fewer_are_refused(tmp_path: Path) -> None:
    train(build(recipe(tmp_path / "run", steps=4))[0])
    train(build(recipe(tmp_path / "run", steps=6))[0])
    train(build(recipe(tmp_path / "whole", steps=6))[0])
    assert state(tmp_path / "run", 6) == state(tmp_path / "whole", 6)
    with pytest.raises(UserError, match=r"train.steps is 5, but .* is already at step 6"):
        train(build(recipe(tmp_path / "run", steps=5))[0])


def test_another_division_of_the_same_batch_continues_and_another_batch_is_refused(tmp_path: Path) -> None:
    train(build(recipe(tmp_path / "run", steps=4, batch_size=4))[0])
    train(build(recipe(tmp_path / "run", steps=5, batch_size=2, gradient_accumulation_steps=2))[0])
    fits = r"4 pictures a step, here it would be 2.*On one process train\.batch_size=2 .*_steps=2 would do"
    with pytest.raises(UserError, match=fits):
        train(build(recipe(tmp_path / "run", steps=6, batch_size=2))[0])


@pytest.mark.parametrize(
    ("pictures", "world", "batch_size", "advice"),
    [
        (8, 2, 4, "On 2 processes train.batch_size=4 train.gradient_accumulation_steps=1 would do"),
        (12, 2, 4, "On 2 processes train.batch_size=3 train.gradient_accumulation_steps=2 would do"),
        (4, 4, 8, "On 4 processes train.batch_size=1 train.gradient_accumulation_steps=1 would do"),
        (4, 3, 1, "No values do on 3 processes; take 1, 2 or 4 of them"),
        (1, 2, 1, "No values do on 2 processes; take 1 of them"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_what_would(pictures: int, world: int, batch_size: int, advice: str) -> None:
    assert _advice(pictures, world, batch_size) == advice


def test_other_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(build(recipe(tmp_path / "run"))[0], until=6)
    train(build(recipe(tmp_path / "run", steps=7))[0])
    monkeypatch.setattr(ToyBatches, "hashes", ToyBatches.hashes | {"3.png": "1" * 8})
    with pytest.raises(UserError, match=r"1 pictures are not those .* the first is '3.png'"):
        train(build(recipe(tmp_path / "run", steps=8))[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    trainer, _ = build(recipe(broken))
    with pytest.raises(Stopped, match=f"{number.name}: stopped after step 3"):
        for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes)):
            if trainer.step == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # an impatient person
            trainer.update(batch)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step-000003"]
    train(build(recipe(broken))[0])
    train(build(recipe(whole))[0])
    assert state(broken, 6) == state(whole, 6)


def start(options: Path) -> subprocess.Popen[str]:
    command = [sys.executable, toy_run.__file__, str(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def options(path: Path, output: Path, **more: Any) -> Path:
    run = recipe(output, steps=60, every=5, ema={"decay": 0.9}).model_dump(mode="json")
    path.write_text(json.dumps({"recipe": run, **more}))
    return path


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(file := options(tmp_path / "broken.json", broken, pause=0.02))
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(0.2 + (os.getpid() % 97) / 100)  # somewhere in a second and a bit of 60 steps
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (broken / "adapters" / "toy.safetensors").exists()
    toy_run.main(file)
    toy_run.main(options(tmp_path / "whole.json", whole))
    name = Path("adapters") / "toy.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert lines(broken) == lines(whole)
    assert not list(broken.rglob(".partial-*"))


def test_a_signal_ends_the_command_with_3(tmp_path: Path) -> None:
    process = start(options(tmp_path / "o.json", tmp_path / "run", signal_at=[7, 0]))
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 3, said
    assert "stopped after step 8; start again to continue" in said
