"""Diffusion's targets, conversions and table against their closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from schedules import PREDICTIONS, TIMES, ddpm, draws, latents, scheduler

from finetune.families.schedulers import with_settings
from finetune.objective import Prediction
from finetune.objectives import DDPM, Denoising
from finetune.objectives.predictions import converted, noise, picture, target
from finetune.objectives.zero_snr import SAMPLING, rescaled
from finetune.randomness import generator
from finetune.sampling import change_scheduler


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_and_target_are_those_of_diffusers(prediction: Prediction) -> None:
    reference, (clean, eps) = scheduler(prediction_type=prediction), latents()
    noised = Denoising(ddpm(prediction)).mixed(clean, TIMES, eps)
    torch.testing.assert_close(noised.noisy, reference.add_noise(clean, eps, TIMES), rtol=1e-6, atol=1e-6)
    velocity = reference.get_velocity(clean, eps, TIMES)
    expected = {"epsilon": eps, "v_prediction": velocity, "sample": clean}[prediction]
    torch.testing.assert_close(noised.target, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(noised.timesteps, TIMES)
    assert torch.equal(noised.weight, torch.ones(len(TIMES)))
    assert not Denoising(ddpm(prediction)).error(noised.target, noised).any(), "the right answer costs nothing"


@pytest.mark.parametrize(("given", "wanted"), itertools.product([*PREDICTIONS, "flow_prediction"], repeat=2))
def test_every_answer_says_the_same_as_every_other(given: Prediction, wanted: Prediction) -> None:
    clean, eps = (tensor.double() for tensor in latents())
    kept = scheduler().alphas_cumprod.double()[TIMES].view(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    noisy, answer = a * clean + s * eps, target(given, clean, eps, a, s)
    torch.testing.assert_close(picture(given, answer, noisy, a, s), clean)
    torch.testing.assert_close(noise(given, answer, noisy, a, s), eps)
    torch.testing.assert_close(converted(answer, given, wanted, noisy, a, s), target(wanted, clean, eps, a, s))


def test_errors_of_one_mistake() -> None:
    """|v|^2 = (S + 1) / S |eps|^2 and |x0|^2 = |eps|^2 / S."""
    process, (clean, eps) = ddpm(), latents()
    snr, parts = process.snr(TIMES), process.parts(clean, TIMES)
    noisy, wrong = process.mix(clean, eps, TIMES), eps + 0.1
    said = {name: converted(wrong, "epsilon", name, noisy, *parts) for name in PREDICTIONS}
    right = {name: target(name, clean, eps, *parts) for name in PREDICTIONS}
    error = {name: (said[name] - right[name]).square().flatten(1).mean(1) for name in PREDICTIONS}
    torch.testing.assert_close(error["v_prediction"], (snr + 1) / snr * error["epsilon"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(error["sample"], error["epsilon"] / snr, rtol=1e-3, atol=1e-6)


def test_without_a_section_draws_are_what_they_were() -> None:
    """Times by ``randint`` and noise by ``randn``, each from its sample's own generator."""
    clean, _ = latents(300)
    noised = Denoising(ddpm()).spoil(clean, draws(300))
    names = [(f"{number}.png", number) for number in range(300)]
    times = torch.cat([torch.randint(1000, (1,), generator=generator(0, "timestep", *name)) for name in names])
    eps = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "noise", *name)) for name in names])
    assert torch.equal(noised.timesteps, times)
    assert torch.equal(noised.target, eps)
    kept = scheduler().alphas_cumprod[times].view(-1, 1, 1, 1)
    assert torch.equal(noised.noisy, kept.sqrt() * clean + (1 - kept).sqrt() * eps)


def test_half_precision_is_compared_in_float32() -> None:
    clean, eps = latents(1)
    objective = Denoising(ddpm())
    noised = objective.mixed(clean, torch.tensor([5]), torch.zeros_like(eps))
    error = objective.error(torch.full_like(eps, 300.0, dtype=torch.float16), noised)
    assert error.dtype == torch.float32
    assert (error == 90000).all(), "float16 would overflow"


def test_video_latents_are_spoiled_alike() -> None:
    clean, eps = latents()
    objective = Denoising(ddpm("v_prediction"))
    flat, deep = (
        objective.mixed(clean.view(7, 4, *shape), TIMES, eps.view(7, 4, *shape)) for shape in ((64,), (2, 4, 8))
    )
    assert torch.equal(flat.noisy.flatten(), deep.noisy.flatten())
    assert torch.equal(flat.target.flatten(), deep.target.flatten())


# ---- zero-terminal SNR -------------------------------------------------------------------------------------------


def test_the_rescaled_table_is_that_of_diffusers_and_ends_at_zero() -> None:
    table = rescaled(scheduler().alphas_cumprod)
    reference = scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(table, reference, rtol=2e-4, atol=1e-6)
    assert table[-1] == 0
    assert table[0] == scheduler().alphas_cumprod[0]
    assert float(table[0]) == pytest.approx(0.99915, abs=1e-5)
    assert (table.diff() < 0).all()
    torch.testing.assert_close(rescaled(table), table), "it is what it would become"


def test_epsilon_says_nothing_where_no_signal_is_left() -> None:
    table = rescaled(scheduler().alphas_cumprod)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDPM(table, "epsilon")
    for prediction in PREDICTIONS[1:]:
        clean, eps = latents(1)
        noised = Denoising(DDPM(table, prediction)).mixed(clean, torch.tensor([999]), eps)
        assert all(bool(tensor.isfinite().all()) for tensor in noised)
        assert torch.equal(noised.noisy, eps)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_perfect_answer_draws_the_picture(zero_snr: bool) -> None:
    """diffusers' sampler with the settings that are saved, and a denoiser that knows the picture."""
    clean, eps = latents(1)
    table = rescaled(scheduler().alphas_cumprod) if zero_snr else scheduler().alphas_cumprod
    process = DDPM(table, "v_prediction")
    trained = scheduler(prediction_type="v_prediction")
    sampler = change_scheduler(with_settings(trained, SAMPLING if zero_snr else {}), "DDIMScheduler")
    sampler.set_timesteps(10)
    assert int(sampler.timesteps[0]) == (999 if zero_snr else 900)
    noisy = process.mix(clean, eps, sampler.timesteps[:1])
    for time in sampler.timesteps:
        a, s = process.parts(noisy, time[None])
        known = (noisy - a * clean) / s
        noisy = sampler.step(target("v_prediction", clean, known, a, s), time, noisy).prev_sample
    torch.testing.assert_close(noisy, clean, rtol=0, atol=0.1)
