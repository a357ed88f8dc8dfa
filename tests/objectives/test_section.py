"""From a recipe's section to an objective: what each key does, and what is refused for which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from schedules import TIMES, ddpm, draws, latents, scheduler

from finetune.config.objective import ObjectiveConfig
from finetune.errors import UserError
from finetune.families.schedulers import with_settings
from finetune.objectives import DDPM, EDM, Denoising, Flow, Process, process_of, refined
from finetune.objectives.shifts import Dynamic
from finetune.objectives.zero_snr import SAMPLING
from finetune.sampling import change_scheduler


def section(**keys: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(keys)


def made(process: Process, **keys: Any) -> Denoising:
    return refined(process, section(**keys))


@pytest.mark.parametrize("process", [ddpm(), ddpm("v_prediction"), EDM()])
def test_an_empty_section_changes_nothing(process: Process) -> None:
    found = refined(process, ObjectiveConfig())
    assert (found.prediction, found.sampling) == (process.prediction, {})
    clean, eps = latents(1)
    times = process.timesteps(torch.tensor([0.5]).double())
    assert torch.equal(found.mixed(clean, times, eps).noisy, Denoising(process).mixed(clean, times, eps).noisy)
    assert found.weigh(times).tolist() == [1.0]


def test_the_usual_draws_follow_from_an_empty_section() -> None:
    clean, _ = latents(50)
    one, two = refined(ddpm(), ObjectiveConfig()).spoil(clean, draws(50)), Denoising(ddpm()).spoil(clean, draws(50))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon"])
def test_every_weighting_of_diffusion_has_its_curve(kind: str) -> None:
    weights = made(ddpm("v_prediction"), weighting={"kind": kind, "least": 0.02}).weigh(TIMES)
    assert weights.isfinite().all()
    assert weights.min() >= 0.02
    assert weights.max() <= 1.0


@pytest.mark.parametrize("kind", ["sigma_sqrt", "sigma_squared", "cosmap"])
def test_every_weighting_of_flows_has_its_curve(kind: str) -> None:
    weights = made(Flow(), weighting={"kind": kind}).weigh(torch.tensor([100.0, 900.0]))
    assert weights[0] != weights[1]


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["huber", "pseudo_huber", "smooth_l1"])
def test_every_loss_turns(kind: str, schedule: str) -> None:
    clean, eps = latents()
    objective = made(ddpm(), loss={"kind": kind, "delta": 0.2, "schedule": schedule})
    noised = objective.mixed(clean, TIMES, eps)
    error = objective.error(noised.target + 3.0, noised)
    assert error.shape == clean.shape
    assert ((error > 0) & (error < 9 if kind != "smooth_l1" else error > 0)).all()
    assert not objective.error(noised.target, noised).any()


def test_times_and_noise_reach_the_objective() -> None:
    clean, _ = latents(1)
    clean = clean.expand(200, -1, -1, -1)
    objective = made(
        ddpm(),
        timesteps={"min": 0.2, "max": 500, "distribution": {"kind": "mode"}, "draws": "stratified"},
        noise={"offset": 0.1, "offset_probability": 0.5, "perturbation": 0.1, "pyramid": {"levels": 3}},
    )
    noised = objective.spoil(clean, draws(200))
    assert 200 <= int(noised.timesteps.min()) < 205 < 495 < int(noised.timesteps.max()) < 500
    assert objective.noise.pyramid is not None
    assert (objective.noise.offset, objective.noise.perturbation, objective.noise.pyramid.levels) == (0.1, 0.1, 3)


def test_shifts_reach_the_objective() -> None:
    own = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0), Path("scheduler"))
    half, size = torch.tensor([0.5]).double(), (64, 64)
    for shift, expected in (
        (None, 0.5),
        ({"kind": "static", "factor": 2.0}, 2 / 3),
        ({"kind": "model"}, 0.75),
        ({"kind": "dynamic"}, 1 / (1 + 1 / 1.8779)),
    ):
        found = made(own, timesteps={"shift": shift, "distribution": {"kind": "uniform"}}).times.shift(half, size)
        assert float(found) == pytest.approx(expected, abs=1e-4)


# ---- what a base was trained on ----------------------------------------------------------------------------------


def test_processes_are_read_from_schedulers() -> None:
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.2)
    flow = process_of(dynamic, Path("scheduler"), unit=1.0, patch=1)
    assert isinstance(flow, Flow)
    assert (flow.unit, flow.shift) == (1.0, Dynamic(max_shift=1.2, patch=1))
    edm = process_of(EDMEulerScheduler(sigma_max=40.0, prediction_type="v_prediction"), Path("scheduler"))
    assert edm == EDM(0.5, 0.002, 40.0, "v_prediction")
    assert isinstance(process_of(scheduler(), Path("scheduler")), DDPM)
    for wrong in (
        DDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    ):
        with pytest.raises(UserError, match="scheduler: "):
            process_of(wrong, Path("scheduler"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edms_right_answer_is_the_picture(prediction: str) -> None:
    """``c_skip x + c_out F`` of diffusers' own preconditioning."""
    sampler = EDMEulerScheduler(prediction_type=prediction)
    process = process_of(sampler, Path("scheduler"))
    clean, eps = latents(3)
    sigma = torch.tensor([0.01, 0.7, 30.0])
    times = process.timesteps((sigma / (1 + sigma)).double())
    torch.testing.assert_close(times, sampler.precondition_noise(sigma), rtol=1e-4, atol=1e-5)
    wide = sigma.view(-1, 1, 1, 1)
    noisy = clean + wide * eps
    torch.testing.assert_close(
        process.mix(clean, eps, times), sampler.precondition_inputs(noisy, wide), rtol=1e-3, atol=1e-4
    )
    drawn = sampler.precondition_outputs(noisy, process.target(clean, eps, times), wide)
    torch.testing.assert_close(drawn, clean, rtol=1e-2, atol=2e-2)


def test_a_perfect_answer_draws_the_picture_along_a_flow() -> None:
    clean, eps = latents(1)
    sampler, process = FlowMatchEulerDiscreteScheduler(shift=3.0), Flow()
    sampler.set_timesteps(8)
    noisy = eps
    for time in sampler.timesteps:
        noisy = sampler.step(process.target(clean, eps, time[None]), time, noisy).prev_sample
    torch.testing.assert_close(noisy, clean, rtol=0, atol=1e-4)


# ---- zero-terminal SNR and other predictions ---------------------------------------------------------------------


def test_zero_terminal_snr_says_how_to_sample() -> None:
    objective = made(ddpm("v_prediction"), zero_terminal_snr=True)
    assert isinstance(objective.process, DDPM) and objective.process.alphas_cumprod[-1] == 0
    assert objective.sampling == SAMPLING
    moved = made(ddpm(), zero_terminal_snr=True, prediction="v_prediction")
    assert moved.sampling == {"prediction_type": "v_prediction", **SAMPLING}
    with pytest.raises(UserError, match=r"objective\.zero_terminal_snr: .*objective\.prediction to v_prediction"):
        made(ddpm(), zero_terminal_snr=True)


def test_an_answer_of_the_base_is_restated() -> None:
    clean, eps = latents()
    objective = made(ddpm(), prediction="v_prediction")
    noised = objective.mixed(clean, TIMES, eps)
    torch.testing.assert_close(objective.restate(eps, noised), noised.target, rtol=1e-3, atol=1e-3)
    same = made(ddpm(), prediction="epsilon")
    assert same.restate(eps, noised) is eps
    assert same.sampling == {}


def test_schedulers_take_the_settings_and_keep_their_own() -> None:
    own = DDIMScheduler(clip_sample=False, beta_start=0.00085, steps_offset=1)
    changed = with_settings(own, SAMPLING)
    assert isinstance(changed, DDIMScheduler)
    assert changed.alphas_cumprod[-1] == 0
    kept = {name: changed.config[name] for name in ("clip_sample", "beta_start", "steps_offset", "timestep_spacing")}
    assert kept == {"clip_sample": False, "beta_start": 0.00085, "steps_offset": 1, "timestep_spacing": "trailing"}
    assert with_settings(own, {}) is own


def test_a_scheduler_that_cannot_becomes_one_that_can() -> None:
    changed = with_settings(PNDMScheduler(beta_start=0.00085, skip_prk_steps=True), SAMPLING)
    assert isinstance(changed, DDIMScheduler)
    assert (changed.config.clip_sample, changed.config.beta_start) == (False, 0.00085)
    assert changed.alphas_cumprod[-1] == 0
    assert HeunDiscreteScheduler in changed.compatibles
    with pytest.raises(UserError, match="HeunDiscreteScheduler has no zero terminal SNR"):
        change_scheduler(changed, "HeunDiscreteScheduler")


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "keys", "reason"),
    [
        (Flow(), {"weighting": {"kind": "min_snr"}}, r"objective\.weighting\.kind: min_snr .*flow matching"),
        (Flow(), {"zero_terminal_snr": True}, r"objective\.zero_terminal_snr: .*flow matching"),
        (Flow(), {"prediction": "epsilon"}, r"objective\.prediction: .*flow matching"),
        (Flow(), {"loss": {"kind": "huber", "schedule": "snr"}}, r"objective\.loss\.schedule: .*flow matching"),
        (EDM(), {"weighting": {"kind": "min_snr"}}, r"objective\.weighting\.kind: min_snr .*EDM"),
        (EDM(), {"loss": {"kind": "huber"}}, r"objective\.loss\.kind: must be l2.*EDM"),
        (EDM(), {"timesteps": {"shift": {"kind": "static"}}}, r"objective\.timesteps\.shift: .*EDM"),
        (ddpm(), {"timesteps": {"shift": {"kind": "static"}}}, r"objective\.timesteps\.shift: .*discrete-time"),
        (ddpm(), {"weighting": {"kind": "cosmap"}}, r"objective\.weighting\.kind: cosmap .*discrete-time"),
        (ddpm(), {"timesteps": {"max": 1200}}, r"objective\.timesteps\.max: must be at most 1000"),
        (ddpm(), {"timesteps": {"min": 600, "max": 0.5}}, r"objective\.timesteps\.min: must be less than max"),
    ],
)
def test_what_means_nothing_to_a_model_is_refused(process: Process, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        made(process, **keys)
