"""Optimizers inside the loop: each learns, is logged truly, and exports what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_with_a_family import lora_recipe
from test_with_a_family import train as train_lora
from torch import Tensor
from toy_run import ToyBatches, build, recipe

from finetune.config.schema import TrainConfig
from finetune.errors import GuardError, UserError
from finetune.train import optimizers
from finetune.train.optim.schedule_free import ScheduleFree
from finetune.train.optimizer_state import state_by_name
from finetune.train.trainer import Trainer

RATES = {  # a rate that suits the toy
    "adamw": 0.05,
    "sgd": 0.5,
    "lion": 0.01,
    "adafactor": 0.05,
    "came": 0.005,
    "prodigy": 1.0,
    "schedulefree": 0.1,
    "muon": 0.05,
    "torch.optim.RAdam": 0.1,
}
MODES = f"{__name__}.Modes"


class Modes(ScheduleFree):
    """As the package schedulefree has it: it begins in the mode that cannot step."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False


def run(trainer: Trainer, until: int | None = None, **options: Any) -> None:
    for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes, **options)):
        trainer.update(batch)
        if trainer.step == until:
            break


def made(path: Path, name: str, **train: Any) -> Trainer:
    settings = {"learning_rate": RATES.get(name, 0.1), **train}
    return build(recipe(path, optimizer={"name": name}, **settings), dropout=0.0)[0]


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def now(trainer: Trainer) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in trainer.adapter.weights().tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_learns(tmp_path: Path, name: str) -> None:
    run(made(tmp_path / "run", name, steps=60))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name", RATES)
def test_a_loss_that_is_not_finite_leaves_weights_and_memory(tmp_path: Path, name: str) -> None:
    trainer = made(tmp_path / "run", name, steps=4)
    before: tuple[dict[str, Tensor], ...] = ()
    with pytest.raises(GuardError, match="the loss of step 3 is not finite"):
        for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes, nan_at=(2, 0))):
            memory = state_by_name(trainer._engine.optimizer, trainer._groups)
            before = now(trainer), {key: value.clone() for key, value in memory.items()}
            trainer.update(batch)
    assert same(now(trainer), before[0])
    assert same(state_by_name(trainer._engine.optimizer, trainer._groups), before[1])


def test_the_rate_that_prodigy_found_is_logged(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", "prodigy", steps=60, schedule={"name": "linear"})
    run(trainer, until=59)
    logged = [row["learning_rate_first"] for row in rows(tmp_path / "run")]
    assert logged[0] == 1e-6, "d0, and the guards against weights that learn nothing let it pass"
    found = trainer._engine.optimizer.param_groups[0]["d"]
    assert logged[-1] == pytest.approx(found * (1 - 58 / 60), rel=0.2)
    assert max(logged) > 100 * logged[0]


@pytest.mark.parametrize("name", ["schedulefree", MODES])
def test_previews_and_exports_are_the_average_and_training_goes_on_without(tmp_path: Path, name: str) -> None:
    watched, alone = made(tmp_path / "watched", name), made(tmp_path / "alone", name)
    for batch in watched.steps(ToyBatches(watched.recipe, watched.processes)):
        watched.update(batch)
        training = now(watched)
        with watched.averaged():
            seen = now(watched)
        assert same(now(watched), training)
    run(alone)
    assert same(now(alone), now(watched)), "a look changes no bit"
    assert not same(seen, training)
    exported = alone.finish()[0].tensors
    assert same(exported, seen)
    again = made(tmp_path / "alone", name)
    run(again)
    assert same(again.finish()[0].tensors, exported), "a finished run exports the same again"


def test_a_second_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.ema is set, but .*Modes exports an average of its own"):
        made(tmp_path / "run", MODES, ema={"decay": 0.9})


@pytest.mark.parametrize("name", [name for name in RATES if "." not in name])
def test_a_lora_that_begins_at_zero_moves_in_both_factors(tmp_path: Path, tiny_sd: Path, name: str) -> None:
    """Zero gradients of A in the first step, and Prodigy's tiny steps, trip no guard."""
    run = lora_recipe(tmp_path / "run", tiny_sd)
    settings = {"steps": 6, "threads": 1, "optimizer": {"name": name}, "learning_rate": RATES[name]}
    run = run.model_copy(update={"train": TrainConfig.model_validate(settings)})
    tensors = train_lora(run, look=False)
    assert all(float(value.abs().max()) > 0 for key, value in tensors.items() if "lora_B" in key)


def test_only_optimizers_with_two_modes_are_asked_for_an_average() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert not optimizers.averages(torch.optim.AdamW([parameter]))
    assert optimizers.averages(ScheduleFree([parameter]))
