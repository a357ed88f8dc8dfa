"""Weights of times: the tables, the limits, and one mistake that costs the same however it is said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from schedules import PREDICTIONS, TIMES, ddpm, latents, scheduler
from torch import Tensor

from finetune.objective import Prediction
from finetune.objectives import DDPM, Flow
from finetune.objectives.predictions import picture
from finetune.objectives.weights import (
    BySigma,
    BySnr,
    cosmap,
    debiased,
    like_epsilon,
    min_snr,
    p2,
    sigma_sqrt,
    sigma_squared,
    soft_min_snr,
)
from finetune.objectives.zero_snr import rescaled
from finetune.randomness import generator

Curve = Callable[[Tensor], Tensor]
CURVES: dict[str, Curve] = {
    "min_snr": partial(min_snr, gamma=5.0),
    "soft_min_snr": partial(soft_min_snr, gamma=5.0),
    "debiased": debiased,
    "p2": partial(p2, gamma=1.0, k=1.0),
    "like_epsilon": like_epsilon,
}


@pytest.mark.parametrize(
    ("prediction", "weights"),
    [
        ("epsilon", [0.0043, 0.5914, 1, 1, 1, 1, 1]),
        ("v_prediction", [0.0043, 0.5289, 0.5905, 0.2763, 0.0825, 0.0142, 0.0047]),
        ("sample", [5, 5, 1.442, 0.3819, 0.0899, 0.01435, 0.00468]),
    ],
)
def test_min_snr_of_the_usual_schedule(prediction: Prediction, weights: list[float]) -> None:
    snr = [1175.4, 8.454, 1.442, 0.3819, 0.0899, 0.01435, 0.00468]
    torch.testing.assert_close(ddpm().snr(TIMES), torch.tensor(snr), rtol=2e-3, atol=1e-4)
    found = BySnr(ddpm(prediction), CURVES["min_snr"])(TIMES)
    torch.testing.assert_close(found, torch.tensor(weights), rtol=4e-4, atol=6e-5)


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [
        ("soft_min_snr", lambda s: 5 / (s + 5)),
        ("debiased", lambda s: s.clamp(max=1000).rsqrt()),
        ("p2", lambda s: 1 / (1 + s)),
        ("like_epsilon", torch.ones_like),
    ],
)
def test_weights_on_epsilon_and_v(name: str, epsilon: Curve) -> None:
    """``w_v = S / (S + 1) w_eps``; debiased is ``sqrt(S) / (S + 1)`` on v, which trainers of others are not."""
    snr = ddpm().snr(TIMES)
    torch.testing.assert_close(BySnr(ddpm(), CURVES[name])(TIMES), epsilon(snr))
    torch.testing.assert_close(BySnr(ddpm("v_prediction"), CURVES[name])(TIMES), snr / (snr + 1) * epsilon(snr))


def test_the_curves_of_p2_and_soft_min_snr() -> None:
    snr = torch.tensor([0.01, 1.0, 100.0])
    torch.testing.assert_close(p2(snr, gamma=0.0, k=1.0), snr, msg="gamma 0 is none, on epsilon")
    torch.testing.assert_close(p2(snr, gamma=0.5, k=3.0) / snr, (3 + snr) ** -0.5)
    soft, hard = soft_min_snr(snr, 5.0), min_snr(snr, 5.0)
    assert (soft < hard).all()
    torch.testing.assert_close(soft[[0, 2]], hard[[0, 2]], rtol=0.06, atol=0)


@pytest.mark.parametrize("name", CURVES)
def test_one_mistake_costs_the_same_in_every_prediction(name: str) -> None:
    """The same mistake in x0, said as eps, v or x0, costs ``curve(SNR) |mistake|^2``."""
    clean, eps = latents()
    mistake = 0.1 * torch.randn(clean.shape, generator=generator(0, "mistake"))
    a, s = ddpm().parts(clean, TIMES)
    expected = CURVES[name](ddpm().snr(TIMES)) * mistake.square().flatten(1).mean(1)
    factors = {"epsilon": -a / s, "v_prediction": -1 / s, "sample": torch.ones_like(a)}
    for prediction in PREDICTIONS:
        process = ddpm(prediction)
        noisy, right = process.mix(clean, eps, TIMES), process.target(clean, eps, TIMES)
        wrong = right + factors[prediction] * mistake
        torch.testing.assert_close(picture(prediction, wrong, noisy, a, s) - clean, mistake, rtol=1e-3, atol=1e-4)
        error = (factors[prediction] * mistake).square().flatten(1).mean(1)
        torch.testing.assert_close(BySnr(process, CURVES[name])(TIMES) * error, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CURVES)
def test_weights_are_finite_at_both_ends(name: str) -> None:
    table = torch.cat([torch.ones(1), rescaled(scheduler().alphas_cumprod)])
    for prediction in PREDICTIONS[1:]:
        weights = BySnr(DDPM(table, prediction), CURVES[name])(torch.tensor([0, 1, 1000]))
        assert weights.isfinite().all()
    assert BySnr(DDPM(torch.tensor([1.0, 0.5])), CURVES[name])(torch.tensor([0])).isfinite().all()


def test_least_keeps_the_last_timestep_learning() -> None:
    process = DDPM(rescaled(scheduler().alphas_cumprod), "v_prediction")
    plain, kept = (BySnr(process, CURVES["min_snr"], least)(torch.tensor([300, 999])) for least in (0.0, 0.05))
    assert plain[1] == 0
    assert kept[1] == pytest.approx(0.05)
    assert kept[0] == plain[0]


def test_weights_of_a_flow() -> None:
    sigma = torch.tensor([0.25, 0.5, 1.0])
    times = Flow().timesteps(sigma.double())
    for curve, expected in (
        (sigma_sqrt, [16.0, 4.0, 1.0]),
        (sigma_squared, [0.0625, 0.25, 1.0]),
        (cosmap, [1.0186, 1.2732, 0.6366]),
    ):
        torch.testing.assert_close(BySigma(Flow(), curve)(times), torch.tensor(expected), rtol=1e-4, atol=0)


def test_sigma_squared_is_the_error_of_the_picture() -> None:
    clean, eps = latents(3)
    process, times = Flow(), Flow().timesteps(torch.tensor([0.1, 0.5, 0.9]).double())
    noisy, answer = process.mix(clean, eps, times), process.target(clean, eps, times) + 0.3
    sigma = process.progress(times).view(-1, 1, 1, 1)
    error = (noisy - sigma * answer - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(BySigma(process, sigma_squared)(times) * 0.3**2, error, rtol=1e-4, atol=1e-6)


def test_cosmap_is_a_density() -> None:
    sigma = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert float(cosmap(sigma).mean()) == pytest.approx(1.0, abs=1e-6)
