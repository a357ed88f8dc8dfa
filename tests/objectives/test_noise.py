"""Noise that is not plain: how much more of what, from whose generator."""

from __future__ import annotations

import pytest
import torch
from schedules import ddpm, draws

from finetune.objective import Draws
from finetune.objectives import Denoising, Flow
from finetune.objectives.noise import Noising, Pyramid

KINDS = {
    "plain": Noising(),
    "offset": Noising(offset=0.3),
    "sometimes": Noising(offset=0.3, offset_probability=0.5),
    "perturbed": Noising(perturbation=0.1),
    "pyramid": Noising(pyramid=Pyramid()),
    "all": Noising(Pyramid(0.5, 3), 0.1, 0.5, 0.1),
}


def spoiled(kind: Noising, count: int = 400, channels: int = 4, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return kind(torch.zeros(count, channels, side, side), draws(count))


@pytest.mark.parametrize("name", KINDS)
def test_nothing_depends_on_the_neighbours(name: str) -> None:
    together = spoiled(KINDS[name], 6)
    torch.manual_seed(99)
    for row in range(6):
        alone = KINDS[name](torch.zeros(1, 4, 8, 8), Draws(0, [f"{row}.png"], [row]))
        assert all(torch.equal(whole[row], one[0]) for whole, one in zip(together, alone, strict=True))


def test_an_offset_adds_its_square_to_the_variance_of_the_mean() -> None:
    asked, mixed = spoiled(KINDS["offset"])
    plain, _ = spoiled(KINDS["plain"])
    assert asked is mixed
    means = (asked - plain).flatten(2)
    assert torch.allclose(means, means[..., :1], atol=1e-5), "one number per channel"
    assert float(asked.mean((2, 3)).var()) == pytest.approx(1 / 64 + 0.3**2, rel=0.1)
    assert float(asked.var()) == pytest.approx(1 + 0.3**2, rel=0.05)


def test_an_offset_may_be_drawn_for_some_alone() -> None:
    change = (spoiled(KINDS["sometimes"])[0] - spoiled(KINDS["plain"])[0]).flatten(1).abs().amax(1)
    assert 0.42 < float((change > 0).float().mean()) < 0.58


def test_a_perturbation_is_mixed_in_and_not_asked_back() -> None:
    asked, mixed = spoiled(KINDS["perturbed"])
    assert torch.equal(asked, spoiled(KINDS["plain"])[0])
    added = mixed - asked
    assert float(added.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float((added * asked).mean())) < 2e-3, "it is fresh noise"
    assert float(mixed.var()) == pytest.approx(1.01, rel=0.02)


@pytest.mark.parametrize("process", [ddpm(), Flow()])
def test_a_perturbation_leaves_the_target_as_it_is(process: object) -> None:
    clean = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = Denoising(process).spoil(clean, draws(8))  # type: ignore[arg-type]
    moved = Denoising(process, noise=KINDS["perturbed"]).spoil(clean, draws(8))  # type: ignore[arg-type]
    assert torch.equal(plain.target, moved.target)
    assert torch.equal(plain.timesteps, moved.timesteps)
    assert not torch.equal(plain.noisy, moved.noisy)


def test_an_offset_is_asked_back_in_diffusion_and_in_flows() -> None:
    clean = torch.zeros(8, 4, 8, 8)
    for process in (ddpm(), Flow()):
        plain, moved = (Denoising(process, noise=KINDS[name]).spoil(clean, draws(8)) for name in ("plain", "offset"))
        change = (moved.target - plain.target).flatten(2)
        assert change.abs().amax() > 0.1
        assert torch.allclose(change, change[..., :1], atol=1e-5)


def test_a_pyramid_is_coarser_and_as_strong() -> None:
    asked, mixed = spoiled(Noising(pyramid=Pyramid(discount=0.8)), side=16)
    assert asked is mixed
    torch.testing.assert_close(asked.flatten(1).std(1), torch.ones(400), rtol=1e-5, atol=0)
    beside = (asked[..., 1:] * asked[..., :-1]).mean()
    plain = spoiled(KINDS["plain"], side=16)[0]
    assert abs(float((plain[..., 1:] * plain[..., :-1]).mean())) < 0.02
    assert beside > 0.15, "neighbours have something in common"
    fine = spoiled(Noising(pyramid=Pyramid(discount=0.1)), side=16)[0]
    assert (fine[..., 1:] * fine[..., :-1]).mean() < beside / 2


def test_one_level_of_a_pyramid_is_noise_like_any_other() -> None:
    asked, _ = spoiled(Noising(pyramid=Pyramid(levels=1)), side=16)
    assert abs(float((asked[..., 1:] * asked[..., :-1]).mean())) < 0.02
