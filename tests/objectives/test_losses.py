"""What differences cost, at given values and in the limits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from schedules import TIMES, ddpm

from finetune.objectives import Flow
from finetune.objectives.losses import Turning, by_snr, constant, exponential, huber, l1, l2, pseudo_huber, smooth_l1

D = torch.tensor([-10.0, -1.0, -0.1, 0.0, 0.1, 1.0, 10.0])


def test_pseudo_huber_at_given_values() -> None:
    found = pseudo_huber(torch.tensor([0.1, 1.0, 10.0]), torch.tensor(0.1))
    torch.testing.assert_close(found, torch.tensor([0.008284, 0.180998, 1.98010]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [huber, pseudo_huber])
def test_huber_is_a_square_near_zero_and_a_line_far_from_it(shape: object) -> None:
    far, near = torch.tensor(1e4), torch.tensor(1e-4)
    torch.testing.assert_close(shape(D, far), D.square(), rtol=1e-4, atol=1e-7)  # type: ignore[operator]
    torch.testing.assert_close(shape(D, near) / (2 * near), D.abs(), rtol=1e-2, atol=1e-4)  # type: ignore[operator]


def test_smooth_l1_is_pseudo_huber_over_delta() -> None:
    torch.testing.assert_close(smooth_l1(D, torch.tensor(0.3)) * 0.3, pseudo_huber(D, torch.tensor(0.3)))
    torch.testing.assert_close(smooth_l1(D, torch.tensor(1e-5)), 2 * D.abs(), rtol=1e-3, atol=1e-4)


def test_huber_is_smooth_where_it_turns() -> None:
    d = torch.tensor([0.5 - 1e-4, 0.5 + 1e-4], requires_grad=True)
    value = huber(d, torch.tensor(0.5))
    value.sum().backward()
    assert d.grad is not None
    torch.testing.assert_close(value[0], value[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(d.grad[0], d.grad[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(huber(D, torch.tensor(0.7)), 2 * torch.nn.HuberLoss("none", 0.7)(D, torch.zeros(7)))


def test_the_turn_moves_with_time() -> None:
    process = ddpm()
    assert constant(TIMES, 0.1).tolist() == pytest.approx([0.1] * 7)
    assert exponential(TIMES, process, 0.1).tolist() == pytest.approx([0.1 ** (t / 1000) for t in TIMES.tolist()])
    sigma = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt()[TIMES]
    torch.testing.assert_close(by_snr(TIMES, process, 0.1), 0.9 / (1 + sigma) ** 2 + 0.1)
    times = Flow().timesteps(torch.tensor([0.001, 0.5, 1.0]).double())
    assert exponential(times, Flow(), 0.01).tolist() == pytest.approx([0.01**0.001, 0.1, 0.01])


def test_every_sample_turns_at_its_own_time() -> None:
    loss = Turning(pseudo_huber, partial(exponential, process=ddpm(), delta=0.1))
    difference = torch.full((7, 4, 8, 8), 1.0)
    cost = loss(difference, TIMES)
    assert cost.shape == difference.shape
    turns = exponential(TIMES, ddpm(), 0.1)
    torch.testing.assert_close(cost[:, 0, 0, 0], pseudo_huber(torch.ones(7), turns))
    assert (cost[:, 0, 0, 0].diff() < 0).all()


def test_l1_and_l2() -> None:
    assert l1(D, TIMES).tolist() == D.abs().tolist()
    assert l2(D, TIMES).tolist() == (D * D).tolist()
