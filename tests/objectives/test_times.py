"""Times against the distribution functions that they are said to have."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from schedules import ddpm, draws
from torch import Tensor

from finetune.objective import Draws
from finetune.objectives import EDM, Flow
from finetune.objectives.shifts import Dynamic, static, unshifted
from finetune.objectives.times import Times, independent, logit_normal, mode, stratified, tilted, uniform

COUNT = 8000
SIZE = (64, 64)


def distance(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's: the largest between an empirical and a true distribution function."""
    ordered = values.double().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    expected = cdf(ordered)
    return float(torch.maximum((steps[1:] - expected).abs(), (expected - steps[:-1]).abs()).max())


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


@pytest.fixture(scope="module")
def many() -> Draws:
    return draws(COUNT)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.2, 1.5)])
def test_logit_normal(many: Draws, mean: float, std: float) -> None:
    shares = Times(partial(logit_normal, mean=mean, std=std))(many, 1000, SIZE)
    assert distance(shares, lambda s: normal_cdf((s.logit() - mean) / std)) < 0.02


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_is_the_papers(many: Draws, scale: float) -> None:
    """``1 - u - scale (cos^2(pi u / 2) - 1 + u)`` of uniform u."""
    u = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    paper = (1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).sort().values
    shares = Times(partial(mode, scale=scale))(many, 1000, SIZE)
    assert distance(shares, lambda s: torch.searchsorted(paper, s) / len(paper)) < 0.02
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (mode(grid, scale).diff() >= -1e-12).all(), "the curve rises"
    torch.testing.assert_close(mode(grid[[0, -1]], scale), grid[[0, -1]])


def test_uniform_times_of_diffusion_cover_the_table(many: Draws) -> None:
    times = ddpm().timesteps(Times()(many, 1000, SIZE))
    assert times.dtype == torch.int64
    counts = torch.bincount(times // 100, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 700
    assert counts.max() < 900


def test_each_time_depends_on_its_own_generator() -> None:
    together = Times()(Draws(3, "abc", (7, 8, 9)), 1000, SIZE)
    apart = [
        float(Times()(Draws(3, name, (number,)), 1000, SIZE)) for name, number in zip("abc", (7, 8, 9), strict=True)
    ]
    assert together.tolist() == apart


# ---- ranges ------------------------------------------------------------------------------------------------------


def test_a_range_cuts_the_distribution(many: Draws) -> None:
    """Inside it times are as likely to each other as before."""
    curve = partial(logit_normal, mean=0.5, std=1.0)
    shares = Times(curve, low=0.3, high=0.6)(many, 1000, SIZE)
    low, high = (float(normal_cdf(torch.tensor(end).logit() - 0.5)) for end in (0.3, 0.6))
    assert shares.min() >= 0.3 - 1e-9
    assert shares.max() <= 0.6 + 1e-9
    assert distance(shares, lambda s: (normal_cdf(s.logit() - 0.5) - low) / (high - low)) < 0.02


def test_a_range_of_timesteps_begins_with_its_first_and_ends_before_its_last(many: Draws) -> None:
    times = ddpm().timesteps(Times(low=0.2, high=0.203)(many, 1000, SIZE))
    assert times.unique().tolist() == [200, 201, 202]


def test_a_range_is_one_of_shifted_times(many: Draws) -> None:
    shares = Times(uniform, 0.5, 0.9, partial(static, factor=3.0))(many, 1000, SIZE)
    assert float(shares.min()) == pytest.approx(0.5, abs=1e-3)
    assert float(shares.max()) == pytest.approx(0.9, abs=1e-3)


# ---- shifts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 6.0])
def test_a_shift_moves_the_middle(many: Draws, factor: float) -> None:
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert static(ends, SIZE, factor).tolist() == pytest.approx([0, factor / (factor + 1), 1])
    shares = Times(uniform, shift=partial(static, factor=factor))(many, 1000, SIZE)
    assert float(shares.median()) == pytest.approx(factor / (factor + 1), abs=0.02)


def test_the_static_shift_is_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    plain = torch.linspace(1, 1000, 1000).flip(0) / 1000
    torch.testing.assert_close(static(plain, SIZE, 3.0), table, rtol=1e-5, atol=1e-6)


def test_the_dynamic_shift_grows_with_the_picture() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = Dynamic()
    assert shift.mu((32, 32)) == pytest.approx(0.5), "256 tokens"
    assert shift.mu((128, 128)) == pytest.approx(1.15), "4096 tokens"
    assert shift.mu((64, 128)) == pytest.approx(0.5 + 0.65 * (2048 - 256) / 3840)
    reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = reference.time_shift(shift.mu((64, 64)), 1.0, sigma)
    torch.testing.assert_close(shift(sigma, (64, 64)), expected, rtol=1e-6, atol=1e-8)


# ---- bias and strata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.5, -1.0])
def test_a_bias_takes_the_highest_or_lowest_of_several(many: Draws, bias: float) -> None:
    shares = Times()(many, 1000, SIZE, torch.full((COUNT,), bias))
    power = 1 + abs(bias)
    assert distance(shares, lambda s: s**power if bias >= 0 else 1 - (1 - s) ** power) < 0.02


def test_a_bias_is_each_samples_own() -> None:
    some = draws(3)
    mixed = Times()(some, 1000, SIZE, torch.tensor([0.0, 2.0, -2.0]))
    plain = Times()(some, 1000, SIZE)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-12, atol=0)
    assert mixed[1] > plain[1]
    assert mixed[2] < plain[2]
    assert tilted(plain, torch.tensor([1.0, 1.0, 1.0])).lt(1).all()


def test_stratified_draws_are_even_in_every_step_and_in_the_whole(many: Draws) -> None:
    u = stratified(many, 1000)
    assert distance(u, lambda s: s) < 0.001
    for start in range(0, 64, 8):
        assert distance(u[start : start + 8], lambda s: s) < 0.25
    random = independent(many, 1000)
    rough = [distance(random[start : start + 8], lambda s: s) for start in range(0, 64, 8)]
    assert max(rough) > 0.3
    assert stratified(Draws(0, ["other"], [5]), 1000) == u[5], "whatever the batch"
    assert stratified(draws(1, seed=1), 1000) != u[0]


# ---- processes ---------------------------------------------------------------------------------------------------


def test_a_flows_times_are_in_the_denoisers_unit_and_off_zero() -> None:
    share = torch.tensor([1e-9, 0.25, 1.0], dtype=torch.float64)
    assert Flow().timesteps(share).tolist() == pytest.approx([1.0, 250.0, 1000.0])
    assert Flow(unit=1.0).timesteps(share).tolist() == pytest.approx([0.001, 0.25, 1.0])
    assert Flow().progress(torch.tensor([250.0])).tolist() == [0.25]


def test_edms_sigma_is_log_normal(many: Draws) -> None:
    shares = Times(partial(logit_normal, mean=-1.2, std=1.2))(many, 1000, SIZE)
    log_sigma = 4 * EDM().timesteps(shares)
    assert distance(log_sigma, lambda x: normal_cdf((x + 1.2) / 1.2)) < 0.02
    torch.testing.assert_close(EDM().progress(EDM().timesteps(shares)).double(), shares, rtol=1e-4, atol=1e-3)
    assert unshifted(shares, SIZE) is shares
