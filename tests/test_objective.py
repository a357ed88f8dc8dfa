"""Diffusion targets and weights against their closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.objective import DDPM, Prediction
from finetune.randomness import generator

PREDICTIONS: list[Prediction] = ["epsilon", "v_prediction", "sample"]
TIMES = torch.tensor([0, 100, 300, 500, 700, 900, 999])


def scheduler(**changes: object) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **changes)


def draws(count: int = len(TIMES)) -> tuple[Tensor, Tensor]:
    rng = generator(0, "latents")
    return torch.randn(count, 4, 8, 8, generator=rng), torch.randn(count, 4, 8, 8, generator=rng)


def recovered(prediction: Prediction, answer: Tensor, noisy: Tensor, signal: Tensor, spoiled: Tensor) -> Tensor:
    """The picture that an answer implies."""
    match prediction:
        case "epsilon":
            return (noisy - spoiled * answer) / signal
        case "v_prediction":
            return signal * noisy - spoiled * answer
        case "sample":
            return answer


def parts(times: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    kept = scheduler().alphas_cumprod.to(dtype)[times]
    return kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1), kept / (1 - kept)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_and_target_are_those_of_diffusers(prediction: Prediction) -> None:
    reference, (clean, noise) = scheduler(prediction_type=prediction), draws()
    noised = DDPM(reference.alphas_cumprod, prediction).spoil(clean, noise, TIMES)
    torch.testing.assert_close(noised.noisy, reference.add_noise(clean, noise, TIMES), rtol=1e-6, atol=1e-6)
    velocity = reference.get_velocity(clean, noise, TIMES)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction]
    torch.testing.assert_close(noised.target, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(noised.timesteps, TIMES)
    assert torch.equal(noised.weight, torch.ones(len(TIMES)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_recovers_the_picture(prediction: Prediction) -> None:
    clean, noise = draws()
    noised = DDPM(scheduler().alphas_cumprod, prediction).spoil(clean, noise, TIMES)
    signal, spoiled, _ = parts(TIMES)
    picture = recovered(prediction, noised.target, noised.noisy, signal, spoiled)
    torch.testing.assert_close(picture, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "weights"),
    [
        ("epsilon", [0.0043, 0.5914, 1, 1, 1, 1, 1]),
        ("v_prediction", [0.0043, 0.5289, 0.5905, 0.2763, 0.0825, 0.0142, 0.0047]),
        ("sample", [5, 5, 1.442, 0.3819, 0.0899, 0.01435, 0.00468]),
    ],
)
def test_min_snr_weights_of_the_usual_schedule(prediction: Prediction, weights: list[float]) -> None:
    _, _, snr = parts(TIMES)
    torch.testing.assert_close(
        snr, torch.tensor([1175.4, 8.454, 1.442, 0.3819, 0.0899, 0.01435, 0.00468]), rtol=2e-3, atol=1e-4
    )
    objective = DDPM(scheduler().alphas_cumprod, prediction, min_snr_gamma=5.0)
    torch.testing.assert_close(objective.spoil(*draws(), TIMES).weight, torch.tensor(weights), rtol=4e-4, atol=6e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_counts_one_error_alike_in_every_prediction(gamma: float) -> None:
    """The same mistake in x0, said as eps, v or x0, costs ``min(SNR, gamma) * |mistake|^2``."""
    clean, noise = draws()
    mistake = 0.1 * torch.randn(clean.shape, generator=generator(0, "mistake"))
    signal, spoiled, snr = parts(TIMES)
    expected = snr.clamp(max=gamma) * mistake.square().flatten(1).mean(1)
    for prediction in PREDICTIONS:
        noised = DDPM(scheduler().alphas_cumprod, prediction, gamma).spoil(clean, noise, TIMES)
        # an answer whose x0 is off by ``mistake``: invert ``recovered``
        factor = {"epsilon": -signal / spoiled, "v_prediction": -1 / spoiled, "sample": torch.ones_like(signal)}
        error = (factor[prediction] * mistake).square().flatten(1).mean(1)
        answer = noised.target + factor[prediction] * mistake
        off = recovered(prediction, answer, noised.noisy, signal, spoiled) - clean
        torch.testing.assert_close(off, mistake, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(noised.weight * error, expected, rtol=1e-4, atol=1e-7)


def test_zero_terminal_snr_needs_another_prediction() -> None:
    table = scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert table[-1] == 0
    assert float(table[0]) == pytest.approx(0.99915, abs=1e-5)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDPM(table, "epsilon")
    for prediction, gamma in itertools.product(PREDICTIONS[1:], (None, 5.0)):
        noised = DDPM(table, prediction, gamma).spoil(*draws(1), torch.tensor([999]))
        assert all(bool(tensor.isfinite().all()) for tensor in noised)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_noiseless_step_has_a_finite_weight(prediction: Prediction) -> None:
    objective = DDPM(torch.tensor([1.0, 0.5]), prediction, min_snr_gamma=5.0)
    assert bool(objective.spoil(*draws(1), torch.tensor([0])).weight.isfinite().all())


def test_times_cover_the_whole_table_evenly() -> None:
    objective = DDPM(torch.linspace(0.99, 0.01, 10))
    times = objective.timesteps([generator(0, "timestep", index) for index in range(4000)])
    assert times.dtype == torch.int64
    counts = torch.bincount(times, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 330
    assert counts.max() < 470


def test_each_time_depends_on_its_own_generator() -> None:
    objective = DDPM(scheduler().alphas_cumprod)
    together = objective.timesteps([generator(3, name) for name in "abc"])
    assert together.tolist() == [int(objective.timesteps([generator(3, name)])) for name in "abc"]


def test_video_latents_are_spoiled_alike() -> None:
    clean, noise = draws()
    objective = DDPM(scheduler().alphas_cumprod, "v_prediction")
    flat, deep = (
        objective.spoil(*(x.view(7, 4, *shape) for x in (clean, noise)), TIMES) for shape in ((64,), (2, 4, 8))
    )
    assert torch.equal(flat.noisy.flatten(), deep.noisy.flatten())
    assert torch.equal(flat.target.flatten(), deep.target.flatten())
