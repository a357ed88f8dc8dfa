"""Any optimizer class by its path: what can be named, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from toy_run import recipe

from finetune.adapter import ParameterGroup
from finetune.config.schema import TrainConfig
from finetune.distributed import start
from finetune.errors import UserError
from finetune.train import check_run, optimizers
from finetune.train.optimizer_state import load_state_by_name, state_by_name

HERE = __name__


class Counting(Optimizer):
    """Keeps a count as a plain number, one of its group, and a tensor of the group."""

    def __init__(self, params: Any, lr: float = 1.0, start: int = 0) -> None:
        super().__init__(params, {"lr": lr, "seen": start, "mean": None})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["seen"] += 1
            group["mean"] = torch.full((2,), float(group["seen"]))
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["flag"], state["share"], state["nothing"] = True, 0.1, None


class Hoarding(Counting):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [1.0]


class Anything(torch.optim.SGD):
    def __init__(self, params: Any, **more: Any) -> None:
        super().__init__(params, **more)


class NotOne:
    pass


def build(name: str, **options: Any) -> tuple[Optimizer, list[ParameterGroup]]:
    config = TrainConfig.model_validate({"optimizer": {"name": name, "options": options}}).optimizer
    group = ParameterGroup("net", {"net.weight": nn.Parameter(torch.ones(3))})
    return optimizers.build_optimizer(config, [group], 0.5), [group]


def test_options_reach_the_class_lists_as_tuples() -> None:
    optimizer, _ = build("torch.optim.NAdam", betas=[0.5, 0.6], momentum_decay=0.1, foreach=False)
    assert isinstance(optimizer, torch.optim.NAdam)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["momentum_decay"], group["foreach"], group["lr"]) == ((0.5, 0.6), 0.1, False, 0.5)
    assert group["name"] == "net"


def test_a_class_that_takes_anything_is_given_anything() -> None:
    assert build(f"{HERE}.Anything", momentum=0.5)[0].param_groups[0]["momentum"] == 0.5
    with pytest.raises(UserError, match=r"Anything refuses them: .*unexpected keyword argument 'momentun'"):
        build(f"{HERE}.Anything", momentun=0.5)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("no_such_package.Lion", {}, "name: no_such_package cannot be imported .* is its package installed"),
        ("torch.optim.RAdamm", {}, "name: torch.optim.RAdamm is not there; did you mean 'RAdam'"),
        (f"{HERE}.NotOne", {}, "NotOne is no torch.optim.Optimizer"),
        ("torch.optim.LBFGS", {}, "computes the loss several times in a step"),
        ("torch.optim.RAdam", {"beta": 1}, r"options.beta is no argument; did you mean 'betas'\?; the class is RAdam"),
        ("torch.optim.RAdam", {"zzz": 1}, r"RAdam\(params: .*, lr: .*, betas: .*, eps: .*, weight_decay"),
        ("torch.optim.RAdam", {"betas": [2.0, 0.9]}, "RAdam refuses them: Invalid beta parameter at index 0"),
    ],
)
def test_what_cannot_be_had_has_its_sentence(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(name, **options)


def test_a_run_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = recipe(tmp_path / "run", optimizer={"name": "torch.optim.RAdam", "options": {"beta": 1}})
    with pytest.raises(UserError, match=r"options.beta is no argument"):
        check_run(run, start(run.train))
    assert not (tmp_path / "run").exists()


def test_numbers_of_weights_and_groups_come_back_as_what_they_were() -> None:
    optimizer, groups = build(f"{HERE}.Counting")
    for _ in range(3):
        optimizer.step()
    kept = state_by_name(optimizer, groups)
    assert kept.keys() == {f"net.weight/{what}#" for what in ("count", "flag", "share")} | {
        "groups.0/seen#",
        "groups.0/mean",
    }
    again, groups = build(f"{HERE}.Counting")
    load_state_by_name(again, groups, kept)
    state = again.state[groups[0].parameters["net.weight"]]
    assert state == {"count": 3, "flag": True, "share": 0.1}
    assert [type(state[what]) for what in ("count", "flag", "share")] == [int, bool, float]
    assert again.param_groups[0]["seen"] == 3
    mean: Tensor = again.param_groups[0]["mean"]
    assert torch.equal(mean, torch.tensor([3.0, 3.0]))


def test_what_no_checkpoint_can_hold_is_named() -> None:
    optimizer, groups = build(f"{HERE}.Hoarding")
    optimizer.step()
    with pytest.raises(UserError, match=r"Hoarding keeps net\.weight/history as a list, which no checkpoint can hold"):
        state_by_name(optimizer, groups)


def test_a_state_of_other_weights_is_refused() -> None:
    optimizer, groups = build("torch.optim.RAdam")
    for key in ("net.other/exp_avg", "groups.1/seen#"):
        with pytest.raises(UserError, match="state is of another run"):
            load_state_by_name(optimizer, groups, {key: torch.zeros(())})
