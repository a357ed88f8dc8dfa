from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from finetune.tinyworld import captions, world
from finetune.tinyworld.training import clip, data, judge, latents, unet, vae
from finetune.tinyworld.training.fit import Plan, fit, generator_for, rate_at
from finetune.tinyworld.world import Scene


def line(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(8, 3, generator=generator)
    return (network(x) - x.sum(1, keepdim=True)).square().mean()


def test_a_resumed_stage_ends_with_the_same_weights(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    whole = fit(model(), line, Plan(40, 1e-2, hold=0.8, save_every=10), tmp_path / "whole")
    fit(model(), line, Plan(20, 1e-2, hold=1.0, save_every=10), tmp_path / "parts")  # still within the held part
    parts = fit(model(), line, Plan(40, 1e-2, hold=0.8, save_every=10), tmp_path / "parts")
    assert torch.equal(whole.weight, parts.weight)  # type: ignore[arg-type]


def test_the_rate_warms_up_is_held_and_falls() -> None:
    plan = Plan(1000, 1.0, warmup=100, hold=0.7, final=0.02)
    assert rate_at(plan, 0) == pytest.approx(0.01)
    assert rate_at(plan, 100) == rate_at(plan, 699) == 1
    assert rate_at(plan, 850) == pytest.approx(0.51)
    assert rate_at(plan, 1000) == pytest.approx(0.02)


def test_processes_and_steps_have_randomness_of_their_own() -> None:
    seeds = {generator_for(seed, step, rank).initial_seed() for seed in (0, 1) for step in range(50) for rank in (0, 1)}
    assert len(seeds) == 200


def oracle(scheduler: Any, clean: Tensor, steps: int) -> Tensor:
    """Sampling with a denoiser that knows the picture."""
    scheduler.set_timesteps(steps)
    noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t]
        noise = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
        velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        noisy = scheduler.step(velocity, t, noisy).prev_sample
    return noisy


@pytest.mark.parametrize("steps", [5, 25])
def test_sampling_with_a_perfect_denoiser_gives_the_picture_back(steps: int) -> None:
    clean = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 2  # beyond what clipping allows
    torch.testing.assert_close(oracle(unet.build_scheduler(), clean, steps), clean, atol=1e-4, rtol=0)


def test_clipping_stays_off_when_the_schedulers_class_changes() -> None:
    config = unet.build_scheduler().config
    assert DDIMScheduler.from_config(DDPMScheduler.from_config(config).config).config.clip_sample is False


def test_the_last_step_is_all_but_noise() -> None:
    assert unet.build_scheduler().alphas_cumprod[-1] < 3e-4


def test_velocity_loss_is_zero_for_the_true_velocity_only() -> None:
    signal = unet.build_scheduler().alphas_cumprod
    clean = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    class Knows(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, noisy: Tensor, times: Tensor, context: Tensor) -> Any:
            a, s = signal[times].sqrt()[:, None, None, None], (1 - signal[times]).sqrt()[:, None, None, None]
            noise = (noisy - a * clean) / s
            return type("Out", (), {"sample": self.share * (a * noise - s * clean)})

    losses = [unet.velocity_loss(Knows(k), clean, clean, signal, torch.Generator().manual_seed(3)) for k in (1.0, 0.5)]
    assert losses[0] < 1e-4 < losses[1]


def test_contrastive_loss_is_log_of_the_batch_for_towers_that_see_nothing() -> None:
    torch.manual_seed(0)
    model = clip.Clip()
    nn.init.zeros_(model.image_projection.weight)
    ids = torch.randint(0, 500, (8, 24))
    loss = clip.contrastive_loss(model, torch.rand(8, 3, 64, 64), ids)
    assert float(loss) == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-4)


def test_a_wrong_caption_raises_the_loss_unless_it_is_the_same() -> None:
    torch.manual_seed(0)
    model, ids, pictures = clip.Clip(), torch.randint(0, 500, (4, 24)), torch.rand(4, 3, 64, 64)
    plain = clip.contrastive_loss(model, pictures, ids)
    assert clip.contrastive_loss(model, pictures, torch.cat([ids, ids])) == plain
    assert clip.contrastive_loss(model, pictures, torch.cat([ids, ids.flip(0)])) > plain


def test_a_misnamed_caption_is_wrong_in_one_factor_and_in_the_fill_where_it_names_one() -> None:
    for index in range(200):
        scene = Scene.draw(6, index)
        text, named = captions.caption(scene.factors, world.rng("right", index))
        read = captions.parse(clip.misnamed(text, named, world.rng("wrong", index)))
        differ = [name for name in named if read[name] != named[name]]
        assert differ == (["fill"] if "fill" in named else differ[:1])
        assert bool(differ) == bool(named)


def test_individuals_are_told_apart_by_their_pairs() -> None:
    apart = torch.eye(4).repeat_interleave(2, 0)  # four individuals, two equal pictures each
    mixed = torch.eye(4).repeat(2, 1)
    assert judge.tell_apart(apart) < 0.05 < judge.tell_apart(mixed)


def test_colours_of_individuals_do_not_count() -> None:
    torch.manual_seed(0)
    from finetune.tinyworld.judge import Judge

    logits = Judge().logits(torch.rand(4, 3, 64, 64))
    factors, individual = torch.zeros(4, 6, dtype=torch.long), torch.tensor([False, False, True, True])
    changed = factors.clone()
    changed[2:, 1:3] = 3  # colour and fill
    assert judge.attribute_loss(logits, factors, individual) == judge.attribute_loss(logits, changed, individual)


def test_object_pixels_weigh_five_times() -> None:
    class Grey(nn.Module):
        def encode(self, pictures: Tensor) -> Any:
            zero = torch.zeros(len(pictures), 4, 4, 4)
            return type("E", (), {"latent_dist": type("P", (), {"mean": zero, "logvar": zero})})

        def decode(self, latent: Tensor) -> Any:
            return type("D", (), {"sample": torch.zeros(len(latent), 3, 16, 16)})

    flat = torch.full((1, 3, 16, 16), 0.5)
    losses = [
        vae.reconstruction_loss(Grey(), flat, torch.full((1, 1, 16, 16), mask), torch.Generator())
        for mask in (0.0, 1.0)
    ]
    assert float(losses[1] / losses[0]) == pytest.approx(5, rel=1e-4)


def test_training_pictures_are_drawn_once_and_pairs_show_one_individual(tmp_path: Path) -> None:
    first = data.load(tmp_path, 3, 8, individuals=True)
    again = data.load(tmp_path, 3, 8, individuals=True)
    assert (first.pictures[:] == again.pictures[:]).all()
    assert (first.factors[::2, 0] == first.factors[1::2, 0]).all()
    assert data.named_factors(first.factors[0])["shape"] == data.scene_of(3, 0, True).shape


def test_rounded_weights_survive_float16() -> None:
    layer = latents.rounded(nn.Linear(7, 5))
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight.half().float(), layer.weight)
