"""Adapters whose training has phases or constraints: what the loop does with ``resting``, ``begin_step``, ``end_step``
and ``penalty``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_run import ToyAdapter, ToyBatches, build, recipe

from finetune.errors import Stopped
from finetune.train import Trainer

OTHERS = ("sgd", "lion", "adafactor", "came", "prodigy", "schedulefree", "muon", "torch.optim.RAdam")


class Phased(ToyAdapter):
    """The first group rests from update 3 on, the last one before it; every update is written down."""

    phased = True

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__(networks)
        self.begun: list[int] = []
        self.ended: list[float] = []
        self.weight = 0.0

    def begin_step(self, step: int) -> None:
        self.begun.append(step)

    def resting(self, step: int) -> frozenset[str]:
        return frozenset({"first"} if step >= 3 else {"last"})

    def end_step(self, rates: Mapping[str, float]) -> None:
        self.ended.append(rates["first"])

    def penalty(self) -> Tensor | None:
        first = self.groups()[0].parameters
        return self.weight * torch.stack([value.square().sum() for value in first.values()]).sum()


def phased(path: Path, **train: object) -> tuple[Trainer, Phased]:
    trainer, networks = build(recipe(path, **train), dropout=0.0)
    adapter = Phased(networks)
    return Trainer(trainer.recipe, trainer.processes, networks, adapter, trainer._trainee._loss), adapter


def weights(adapter: Phased) -> dict[str, dict[str, Tensor]]:
    return {g.name: {name: v.detach().clone() for name, v in g.parameters.items()} for g in adapter.groups()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_group_that_rests_keeps_every_bit_and_the_other_moves(tmp_path: Path) -> None:
    trainer, adapter = phased(tmp_path / "run", steps=6)
    seen = [weights(adapter)]
    for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes)):
        trainer.update(batch)
        seen.append(weights(adapter))
    moved = [(not same(a["first"], b["first"]), not same(a["last"], b["last"])) for a, b in pairwise(seen)]
    assert moved == [(True, False)] * 3 + [(False, True)] * 3, "weight decay and momentum move nothing either"
    assert list(dict.fromkeys(adapter.begun)) == [0, 1, 2, 3, 4, 5]
    assert len(adapter.ended) == 6


@pytest.mark.parametrize(
    ("optimizer", "cut"), [("adamw", 2), ("adamw", 3), ("adamw", 4), *((name, 4) for name in OTHERS)]
)
def test_an_interruption_in_any_phase_changes_no_bit(optimizer: str, cut: int, tmp_path: Path) -> None:
    rate = 1.0 if optimizer == "prodigy" else 0.05

    def run(path: Path, stop: int | None) -> dict[str, dict[str, Tensor]]:
        trainer, adapter = phased(path, steps=6, every=1, optimizer={"name": optimizer}, learning_rate=rate)
        for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes)):
            trainer.update(batch)
            if trainer.step == stop:
                trainer._stopping = "test"
        return weights(adapter)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", cut)
    again = run(tmp_path / "cut", None)
    assert all(same(whole[name], again[name]) for name in whole)


def test_the_penalty_is_part_of_the_loss_and_of_its_gradient(tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 0.5):
        trainer, adapter = phased(tmp_path / str(weight), steps=6)
        adapter.weight = weight
        before = adapter.penalty()
        steps = trainer.steps(ToyBatches(trainer.recipe, trainer.processes))
        losses.append(float(trainer.update(next(steps))))
        assert before is not None
        penalty = float(before)
    assert losses[1] == pytest.approx(losses[0] + penalty, rel=1e-5)
    assert penalty > 0
