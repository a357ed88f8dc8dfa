"""What holds for every optimizer: rates and decay by groups, rest, memory, float16, bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from built_optimizers import OPTIMIZERS, config, groups, parameters, set_gradients

from finetune.errors import UserError
from finetune.train import optimizers
from finetune.train.optimizer_state import load_state_by_name, state_by_name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_keep_their_rates_and_only_what_decays_decays(name: str) -> None:
    made = groups()
    optimizer = optimizers.build_optimizer(config(name), made, 0.1)
    found = optimizers.set_rates(optimizer, 0.5)
    factor = {group["name"]: group["d"] if "d0" in group else 1.0 for group in optimizer.param_groups}
    assert found == pytest.approx({"net": 0.05 * factor["net"], "text": 0.5 * factor["text"]})
    assert {group["weight_decay"] for group in optimizer.param_groups if group["name"] == "text"} == {0.0}


def test_the_logged_rate_is_what_prodigy_found_times_the_schedule() -> None:
    made = groups()
    optimizer = optimizers.build_optimizer(config("prodigy"), made, 1.0)
    for draw in range(20):
        optimizers.set_rates(optimizer, 0.5)
        set_gradients(made, 1)
        optimizer.step()
        assert draw < 5 or optimizer.param_groups[0]["d"] > 1e-6
    assert optimizers.rates(optimizer)["net"] == 0.5 * optimizer.param_groups[0]["d"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_without_gradient_keeps_every_bit(name: str) -> None:
    """Decay and momentum included; and a group at rest counts no step."""
    made = groups()
    optimizer = optimizers.build_optimizer(config(name), made, 0.1)
    for draw in (1, 2):
        set_gradients(made, draw)
        optimizer.step()
    before = [one.detach().clone() for one in parameters(made)]
    remembered = {key: value.clone() for key, value in state_by_name(optimizer, made).items()}
    set_gradients(made, 3)
    for one in made[0].parameters.values():
        one.grad = None
    optimizer.step()
    moved = [not torch.equal(one, then) for one, then in zip(parameters(made), before, strict=True)]
    assert moved == [False, False, False, True]
    others = [number for number, group in enumerate(optimizer.param_groups) if group["name"] == "net"]
    resting = ("net.", *(f"groups.{number}/" for number in others))
    after = state_by_name(optimizer, made)
    assert all(torch.equal(after[key], value) for key, value in remembered.items() if key.startswith(resting))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_takes_the_same_next_steps(name: str) -> None:
    made, again = groups(), groups()
    optimizer = optimizers.build_optimizer(config(name), made, 0.1)
    for draw in range(1, 5):
        set_gradients(made, draw)
        optimizer.step()
    kept = {key: value.clone() for key, value in state_by_name(optimizer, made).items()}
    with torch.no_grad():
        for one, other in zip(parameters(again), parameters(made), strict=True):
            one.copy_(other)
    other = optimizers.build_optimizer(config(name), again, 0.1)
    load_state_by_name(other, again, kept)
    assert {key: type(value) for key, value in _plain(optimizer)} == {key: type(value) for key, value in _plain(other)}
    for draw in range(5, 8):
        for one in (made, again):
            set_gradients(one, draw)
        optimizer.step()
        other.step()
    assert all(torch.equal(one, two) for one, two in zip(parameters(made), parameters(again), strict=True))
    end, end_too = state_by_name(optimizer, made), state_by_name(other, again)
    assert end.keys() == end_too.keys() and all(torch.equal(end[key], end_too[key]) for key in end)


def _plain(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Everything in states, whatever it is."""
    for number, state in enumerate(optimizer.state.values()):
        yield from ((f"{number} {what}", value) for what, value in state.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_under_float16_changes_neither_weights_nor_memory(name: str) -> None:
    made = groups()
    optimizer = optimizers.build_optimizer(config(name), made, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for draw in (1, 2):
        scaler.scale(torch.zeros(()))
        set_gradients(made, draw)
        before = [one.detach().clone() for one in parameters(made)]
        memory = {key: value.clone() for key, value in state_by_name(optimizer, made).items()}
        if draw == 2:
            made[0].parameters["net.bias"].grad[0] = math.inf  # type: ignore[index]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(one, then) for one, then in zip(parameters(made), before, strict=True))
    after = state_by_name(optimizer, made)
    assert memory.keys() == after.keys() and all(torch.equal(memory[key], after[key]) for key in memory)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "." not in name])
def test_the_plan_counts_the_bytes_that_are_kept(name: str) -> None:
    made = groups()
    chosen = config(name)
    optimizer = optimizers.build_optimizer(chosen, made, 0.1)
    set_gradients(made, 1)
    optimizer.step()
    kept = state_by_name(optimizer, made)
    tables = {table for group in made for table in group.tables}
    for group in made:
        for key, parameter in group.parameters.items():
            held = sum(one.nbytes for what, one in kept.items() if what.startswith(f"{key}/") and one.ndim > 0)
            assert held == chosen.state_bytes(parameter.shape, key in tables), key


def test_states_of_8_bits_are_counted_with_their_scales() -> None:
    adamw, lion = config("adamw8bit"), config("lion8bit")
    assert adamw.state_bytes((64, 64)) == 2 * (4096 + 4 * 16) == 2 * lion.state_bytes((64, 64))
    assert adamw.state_bytes((63, 64)) == 2 * 4 * 63 * 64, "small ones stay float32"


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_8_bits_say_what_they_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{name} needs a CUDA GPU"):
        optimizers.build_optimizer(config(name), groups(), 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'finetune\[8bit\]'"):
        optimizers.build_optimizer(config(name), groups(), 0.1)


def test_8_bits_are_called_with_the_arguments_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: the library itself needs a GPU, and has not been run."""
    called: dict[str, Any] = {}
    stand_in = SimpleNamespace(
        AdamW8bit=lambda params, lr, betas, eps, weight_decay: called.update(adamw=(lr, betas, eps, weight_decay)),
        Lion8bit=lambda params, lr, betas, weight_decay: called.update(lion=(lr, betas, weight_decay)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=stand_in))
    optimizers.build_optimizer(config("adamw8bit"), groups(), 0.1)
    optimizers.build_optimizer(config("lion8bit"), groups(), 0.1)
    assert called == {"adamw": (0.1, (0.9, 0.999), 1e-8, 0.01), "lion": (0.1, (0.9, 0.99), 0.01)}
