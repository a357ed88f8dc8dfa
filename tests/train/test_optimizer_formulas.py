"""Each optimizer does what its paper says: steps computed by hand, from the formulas and not from the code."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from built_optimizers import config, groups, numbers, parameters, set_gradients
from torch import Tensor, nn

from finetune.adapter import ParameterGroup
from finetune.errors import UserError
from finetune.train import optimizers
from finetune.train.optim.came import Came
from finetune.train.optim.lion import Lion
from finetune.train.optim.muon import MuonWithAdamW
from finetune.train.optim.prodigy import Prodigy
from finetune.train.optim.schedule_free import ScheduleFree


def single(start: Tensor, make: Callable[..., torch.optim.Optimizer], gradients: list[Tensor], **settings: Any) -> Any:
    """One parameter after steps with the given gradients, and the optimizer."""
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter], **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-2)


STEPS = [numbers(3, 2, draw=draw) for draw in range(1, 6)]
START = numbers(3, 2)


def test_lion_moves_by_signs_of_interpolated_momentum() -> None:
    rate, decay = 0.1, 0.2
    found, _ = single(START, Lion, STEPS, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    weight, momentum = START.double(), torch.zeros(3, 2).double()
    for gradient in STEPS:
        weight = weight - rate * (torch.sign(0.9 * momentum + 0.1 * gradient) + decay * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    close(found, weight)


def test_every_number_moves_by_the_rate_under_lion() -> None:
    found, _ = single(START, Lion, STEPS[:1], lr=0.25)
    assert torch.equal((START - found).sign(), STEPS[0].sign())
    close((START - found).abs(), torch.full((3, 2), 0.25))


@pytest.mark.parametrize("r", [0.0, 1.0])
def test_schedule_free_averages_the_steps_of_z(r: float) -> None:
    """x, y and z carried along as in the paper, with a rate that rises; the code stores neither x nor this."""
    parameter = nn.Parameter(START.clone())
    beta1, beta2, eps, decay, rate = 0.9, 0.99, 1e-8, 0.1, 0.05
    optimizer = ScheduleFree([parameter], betas=(beta1, beta2), eps=eps, weight_decay=decay, r=r)
    x = z = START.double()
    squares, weights = torch.zeros(3, 2).double(), []
    for count, gradient in enumerate(STEPS, start=1):
        now = rate * min(1.0, count / 3)
        optimizer.param_groups[0]["lr"] = now
        y = (1 - beta1) * z + beta1 * x
        close(parameter.detach(), y)
        squares = beta2 * squares + (1 - beta2) * gradient.double() ** 2
        z = z - now * (gradient / ((squares / (1 - beta2**count)).sqrt() + eps) + decay * y)
        weights.append(count**r * now**2)
        share = weights[-1] / sum(weights)
        x = (1 - share) * x + share * z
        parameter.grad = gradient.clone()
        optimizer.step()
    optimizer.eval()
    close(parameter.detach(), x)
    with pytest.raises(RuntimeError, match="hold the average"):
        optimizer.step()
    optimizer.train()
    close(parameter.detach(), (1 - beta1) * z + beta1 * x)


def test_without_momentum_and_decay_the_average_is_the_mean_of_the_steps() -> None:
    """At a constant rate and r = 0, x is the plain mean of z_1 ... z_t."""
    parameter, points = nn.Parameter(START.clone()), []
    optimizer = ScheduleFree([parameter], lr=0.1)
    for gradient in STEPS:
        parameter.grad = gradient.clone()
        optimizer.step()
        points.append(optimizer.state[parameter]["z"].clone())
    optimizer.eval()
    close(parameter.detach(), torch.stack(points).mean(0))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_prodigy_follows_its_algorithm(safe: bool, corrected: bool) -> None:
    """Algorithm 4 with its own (1 - β3), in the paper's units."""
    d, eps, decay = 1e-2, 1e-8, 0.1
    beta1, beta2 = 0.9, 0.99
    beta3 = math.sqrt(beta2)
    settings = {"lr": 0.5, "betas": (beta1, beta2), "weight_decay": decay, "d0": d, "safeguard_warmup": safe}
    parameter = nn.Parameter(START.clone())
    optimizer = Prodigy([parameter], bias_correction=corrected, **settings)  # type: ignore[arg-type]
    x = START.double()
    m = v = s = torch.zeros(3, 2).double()
    r, seen = 0.0, []
    for count, gradient in enumerate(STEPS, start=1):
        g = gradient.double()
        rate = 0.5 * (math.sqrt(1 - beta2**count) / (1 - beta1**count) if corrected else 1.0)
        r = beta3 * r + (1 - beta3) * rate * d**2 * float((g * (START - x)).sum())
        s = beta3 * s + (1 - beta3) * (1.0 if safe else rate) * d**2 * g
        m, v = beta1 * m + (1 - beta1) * d * g, beta2 * v + (1 - beta2) * d**2 * g**2
        x = x - rate * d * (m / (v.sqrt() + d * eps) + decay * x)
        d = max(d, r / float(s.abs().sum()))
        parameter.grad = gradient.clone()
        optimizer.step()
        seen.append(d)
        assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-4)
    assert seen == sorted(seen)
    close(parameter.detach(), x, 1e-4)


@pytest.mark.parametrize("distance", [0.01, 1.0, 100.0])
def test_prodigy_finds_the_order_of_the_distance_without_a_rate(distance: float) -> None:
    """On a quadratic with its bottom ``distance`` away in each coordinate, from d0 = 1e-6."""
    target = distance * numbers(20).sign()
    parameter = nn.Parameter(torch.zeros(20))
    optimizer, seen = Prodigy([parameter]), []
    for _ in range(1000):
        parameter.grad = parameter.detach() - target
        optimizer.step()
        seen.append(optimizer.param_groups[0]["d"])
    assert seen[0] == 1e-6 and seen == sorted(seen)
    assert 0.01 * distance < seen[-1] <= distance, "a lower bound of ‖x0 - x*‖∞"
    assert float((parameter.detach() - target).abs().max()) < 0.05 * distance


def test_each_group_finds_its_own_rate_under_prodigy() -> None:
    near, far = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    optimizer = Prodigy([{"params": [near]}, {"params": [far]}])
    for _ in range(500):
        near.grad, far.grad = near.detach() - 0.01, far.detach() - 10.0
        optimizer.step()
    one, other = (group["d"] for group in optimizer.param_groups)
    assert 100 < other / one < 10000


def test_growth_is_limited_where_that_is_asked_for() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer, seen = Prodigy([parameter], growth_rate=1.2), [1e-6]
    for _ in range(50):
        parameter.grad = parameter.detach() - 1.0
        optimizer.step()
        seen.append(optimizer.param_groups[0]["d"])
    assert max(after / before for before, after in pairwise(seen)) == pytest.approx(1.2)


def factored(squares: Tensor) -> Tensor:
    """Rows and columns of a matrix of squares, and their product over the mean: the best of rank one (Adafactor)."""
    return squares.mean(1, keepdim=True) * squares.mean(0, keepdim=True) / squares.mean()


def test_came_divides_by_what_updates_stray() -> None:
    rate, decay = 0.1, 0.2
    (beta1, beta2, beta3), (eps1, eps2) = (0.9, 0.99, 0.999), (1e-30, 1e-16)
    settings = {"lr": rate, "betas": (beta1, beta2, beta3), "eps": (eps1, eps2), "weight_decay": decay}
    found, optimizer = single(START, Came, STEPS, **settings)
    weight, mean = START.double(), torch.zeros(3, 2).double()
    squares = strays = torch.zeros(3, 2).double()
    for gradient in STEPS:
        squares = beta2 * squares + (1 - beta2) * (gradient.double() ** 2 + eps1)
        update = gradient / factored(squares).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        mean = beta1 * mean + (1 - beta1) * update
        strays = beta3 * strays + (1 - beta3) * ((update - mean) ** 2 + eps2)
        weight = weight - rate * (mean / factored(strays).sqrt() + decay * weight)
    close(found, weight, 1e-4)
    (state,) = optimizer.state.values()
    shapes = {"exp_avg": (3, 2), "exp_avg_sq_row": (3,), "exp_avg_sq_col": (2,)}
    assert {what: tuple(state[what].shape) for what in shapes} == shapes


def test_adafactor_keeps_means_of_rows_and_columns() -> None:
    """With ``scale_parameter`` off, the rate is the recipe's own."""
    group = ParameterGroup("net", {"net.weight": nn.Parameter(START.clone())})
    optimizer = optimizers.build_optimizer(config("adafactor"), [group], 0.1)
    weight, squares = START.double(), torch.zeros(3, 2).double()
    for count, gradient in enumerate(STEPS, start=1):
        share = count**-0.8
        squares = (1 - share) * squares + share * (gradient.double() ** 2 + 1e-30)
        update = gradient / factored(squares).sqrt()
        weight = weight - 0.1 * update / max(1.0, float(update.square().mean().sqrt()))
        group.parameters["net.weight"].grad = gradient.clone()
        optimizer.step()
    close(group.parameters["net.weight"].detach(), weight, 1e-4)


def test_muon_moves_matrices_at_the_size_of_adamw_and_the_rest_as_adamw_does() -> None:
    made = groups()
    optimizer = optimizers.build_optimizer(config("muon", weight_decay=0.0, nesterov=False), made, 0.01)
    assert isinstance(optimizer, MuonWithAdamW)
    kinds = {name: group["kind"] for group in optimizer.param_groups for name in _names(made, group)}
    assert kinds == {"net.weight": "matrices", "net.kernel": "others", "net.bias": "others", "text.table": "others"}
    before = {name: one.detach().clone() for group in made for name, one in group.parameters.items()}
    other = groups()
    plain = torch.optim.AdamW(list(parameters(other)), lr=0.01, weight_decay=0.0)
    for group in plain.param_groups:
        assert group["betas"] == (0.9, 0.999)
    for one in (made, other):
        set_gradients(one, 1)
    optimizer.step()
    plain.step()
    for name in ("net.kernel", "net.bias"):
        close(made[0].parameters[name].detach(), other[0].parameters[name].detach())
    step = (before["net.weight"] - made[0].parameters["net.weight"].detach()) / 0.01
    singular = torch.linalg.svdvals(step) / (0.2 * math.sqrt(6))
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.4, "Newton-Schulz brings them near 1"
    assert float((step * numbers(6, 4, draw=1)).sum()) > 0, "downhill"


def _names(of: list[ParameterGroup], group: dict[str, Any]) -> list[str]:
    named = {id(one): name for made in of for name, one in made.parameters.items()}
    return [named[id(one)] for one in group["params"]]


def test_muon_without_a_matrix_is_refused() -> None:
    vectors = [ParameterGroup("net", {"net.bias": nn.Parameter(torch.zeros(3))})]
    with pytest.raises(UserError, match="muon moves matrices, and none trains here"):
        optimizers.build_optimizer(config("muon"), vectors, 0.01)
