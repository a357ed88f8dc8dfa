"""The loss: per sample, in the right half, with the right caption, the same in every batch and process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.adapters import attach
from finetune.batch import Batch, Conditioning, Posterior
from finetune.config.adapters import FullConfig, LoraConfig
from finetune.config.objective import MinSnrWeighting, ObjectiveConfig
from finetune.config.schema import ModelConfig
from finetune.denoise import denoising_error, masked_mean, mixed_loss, pairwise_loss, preservation_error, spoil
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.objectives import DDPM, Denoising
from finetune.randomness import generator

CAPTIONS = ("a red star", "a photo of a zib star", "a blue ring on grass", "")


def make_batch(rows: tuple[int, ...] = (0, 1, 2, 3), prior: tuple[bool, ...] = (False, False, True, True)) -> Batch:
    """Rows of one fixed set of four samples, each different from the others in every respect."""
    means = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "mean", row)) for row in rows])
    return Batch(
        ids=tuple(f"picture-{row}" for row in rows),
        draws=tuple(10 + row for row in rows),
        captions=tuple(CAPTIONS[row] for row in rows),
        posterior=Posterior(mean=means, logvar=torch.full_like(means, -2.0)),
        prior=torch.tensor([prior[row] for row in rows]),
        weight=torch.ones(len(rows)),
        geometry=torch.zeros(len(rows), 6, dtype=torch.int64),
    )


@pytest.fixture
def family(tiny_family: ModelFamily) -> ModelFamily:
    tiny_family.require("denoiser", "text_encoder")
    return tiny_family


def test_error_is_the_mean_square_of_each_sample(family: ModelFamily) -> None:
    batch = make_batch()
    noised = spoil(family, batch, seed=1)
    answer = family.predict(noised.noisy, noised.timesteps, family.encode_prompt(batch.captions), batch.geometry)
    expected = torch.stack([((a - t) ** 2).mean() for a, t in zip(answer, noised.target, strict=True)])
    error = denoising_error(family, batch, seed=1)
    assert error.shape == (4,)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, expected)


def test_each_sample_is_what_it_would_be_alone(family: ModelFamily) -> None:
    """Captions, noise, times and latents of row i belong together, in any order and beside any company."""
    together = denoising_error(family, make_batch(), seed=1)
    for rows in ((0,), (3, 1), (2, 0, 1, 3)):
        apart = denoising_error(family, make_batch(rows), seed=1)
        torch.testing.assert_close(apart, together[list(rows)], rtol=1e-5, atol=1e-6)


def test_error_heeds_the_caption(family: ModelFamily) -> None:
    batch = make_batch()
    swapped = replace(batch, captions=batch.captions[::-1])
    assert not torch.isclose(denoising_error(family, batch, 1), denoising_error(family, swapped, 1), rtol=1e-4).any()


def test_prompts_encoded_ahead_change_nothing(family: ModelFamily) -> None:
    batch = make_batch()
    ahead = Conditioning.stack([family.encode_prompt([caption]) for caption in batch.captions])
    torch.testing.assert_close(
        denoising_error(family, replace(batch, prompt=ahead), 1),
        denoising_error(family, batch, 1),
        rtol=1e-5,
        atol=1e-6,
    )
    whole = family.encode_prompt(batch.captions)
    assert torch.equal(denoising_error(family, replace(batch, prompt=whole), 1), denoising_error(family, batch, 1))


def test_weights_of_sample_and_time_multiply(tiny_sd: Path, family: ModelFamily) -> None:
    weighting = MinSnrWeighting(kind="min_snr", gamma=0.1)
    weighted = load_family(ModelConfig(path=str(tiny_sd)), ObjectiveConfig(weighting=weighting))
    weighted.require("denoiser", "text_encoder")
    batch = replace(make_batch(), weight=torch.tensor([1.0, 0.0, 2.0, 0.5]))
    of_time = spoil(weighted, batch, 1).weight
    assert not torch.equal(of_time, torch.ones(4))
    expected = batch.weight * of_time * denoising_error(family, make_batch(), 1)
    torch.testing.assert_close(denoising_error(weighted, batch, 1), expected)


# ---- how latents are spoiled -------------------------------------------------------------------------------------


def test_spoiling_does_not_depend_on_the_company(family: ModelFamily) -> None:
    together = spoil(family, make_batch(), seed=1)
    torch.manual_seed(99)
    apart = [spoil(family, make_batch((row,)), seed=1) for row in range(4)]
    for whole, pieces in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_spoiling_depends_on_seed_and_draw(family: ModelFamily) -> None:
    batch = make_batch()
    first = spoil(family, batch, seed=1)
    for other in (spoil(family, batch, seed=2), spoil(family, replace(batch, draws=(0, 1, 2, 3)), seed=1)):
        assert not torch.isclose(first.target, other.target).all(dim=(1, 2, 3)).any()
        assert not torch.equal(first.timesteps, other.timesteps)


def test_latents_are_drawn_from_the_posterior_and_scaled(family: ModelFamily) -> None:
    sure = replace(
        make_batch(), posterior=Posterior(mean=torch.ones(4, 4, 8, 8), logvar=torch.full((4, 4, 8, 8), -99.0))
    )
    family.objective = Denoising(DDPM(torch.ones(1), "sample"))
    torch.testing.assert_close(spoil(family, sure, 1).noisy, torch.full((4, 4, 8, 8), 0.18215), rtol=1e-5, atol=1e-6)
    unsure = replace(sure, posterior=Posterior(mean=torch.zeros(4, 4, 8, 8), logvar=torch.zeros(4, 4, 8, 8)))
    assert float(spoil(family, unsure, 1).noisy.std()) == pytest.approx(0.18215, rel=0.1)


PROCESS = """
import torch
from types import SimpleNamespace
from finetune.batch import Batch, Posterior
from finetune.denoise import spoil
from finetune.objectives import DDPM, Denoising

def checksum(seed):
    torch.manual_seed(seed)
    family = SimpleNamespace(objective=Denoising(DDPM(torch.linspace(0.99, 0.01, 1000))), scale=lambda latents: latents)
    zeros = torch.zeros(1, 4, 8, 8)
    batch = Batch(ids=("a",), draws=(3,), captions=("",), posterior=Posterior(mean=zeros, logvar=zeros),
                  prior=torch.tensor([False]), weight=torch.ones(1), geometry=torch.zeros(1, 6, dtype=torch.int64))
    return [tensor.double().sum().item() for tensor in spoil(family, batch, 5)]
"""


def test_spoiling_does_not_depend_on_the_process() -> None:
    command = [sys.executable, "-c", PROCESS + "print(checksum(1))"]
    elsewhere = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    here: dict[str, Any] = {}
    exec(PROCESS, here)
    assert elsewhere.strip() == str(here["checksum"](2))


# ---- masks -------------------------------------------------------------------------------------------------------


def test_mask_of_ones_is_no_mask() -> None:
    error = torch.rand(3, 4, 8, 8, generator=generator(0, "error"))
    torch.testing.assert_close(masked_mean(error, torch.ones(3, 1, 8, 8)), masked_mean(error, None), rtol=1e-6, atol=0)


def test_no_gradient_from_outside_the_mask_nor_to_the_class_half() -> None:
    """Row 0 is a masked subject, row 1 a class picture with a mask of ones."""
    target = torch.randn(2, 4, 8, 8, generator=generator(0, "t"))
    mask = torch.ones(2, 1, 8, 8)
    mask[0, :, :, :5] = 0

    def gradient(mask: Tensor | None) -> Tensor:
        answer = torch.zeros_like(target, requires_grad=True)
        pairwise_loss(masked_mean((answer - target).square(), mask), torch.tensor([False, True]), 1.0).total.backward()
        assert answer.grad is not None
        return answer.grad

    masked, plain = gradient(mask), gradient(None)
    assert bool((masked[0, :, :, :5] == 0).all())
    assert bool((masked[0, :, :, 5:] != 0).all())
    torch.testing.assert_close(masked[1], plain[1], rtol=1e-6, atol=0)


def test_a_small_subject_counts_as_much_as_a_large_one() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :1, :1] = 1
    mask[1, :, :6] = 1
    error = masked_mean(torch.full((2, 4, 8, 8), 9.0), mask)
    torch.testing.assert_close(error, torch.tensor([9.0, 9.0]))


def test_an_empty_mask_is_no_error_and_no_nan() -> None:
    assert masked_mean(torch.ones(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)).tolist() == [0.0]


def test_soft_masks_weigh() -> None:
    mask, error = torch.tensor([[[[1.0, 0.25]]]]), torch.tensor([[[[1.0, 4.0]]]])
    torch.testing.assert_close(masked_mean(error, mask), torch.tensor([(1 * 1 + 0.25 * 4) / 1.25]))


# ---- the two layouts of the prior --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [(False, False, True, True), (True, False, False, True)])
def test_pairwise_is_subject_plus_lambda_class(family: ModelFamily, prior: tuple[bool, ...]) -> None:
    batch = make_batch(prior=prior)
    error = denoising_error(family, batch, seed=1)
    subject = [row for row in range(4) if not prior[row]]
    kept = [row for row in range(4) if prior[row]]
    alone, kept_alone = (denoising_error(family, make_batch(tuple(rows)), 1).mean() for rows in (subject, kept))
    for weight in (0.0, 0.3, 1.0):
        loss = pairwise_loss(error, batch.prior, weight)
        torch.testing.assert_close(loss.instance, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.prior, kept_alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.total, loss.instance + weight * loss.prior, rtol=0, atol=1e-7)
    assert torch.equal(pairwise_loss(error, batch.prior, 0.0).total, error[subject].mean())


def test_equal_halves_have_equal_parts(family: ModelFamily) -> None:
    error = denoising_error(family, make_batch((0, 1, 0, 1)), seed=1)
    loss = pairwise_loss(error, torch.tensor([False, False, True, True]), 1.0)
    torch.testing.assert_close(loss.instance, loss.prior, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_mixed_is_half_of_pairwise_on_a_balanced_batch(weight: float) -> None:
    error, prior = torch.tensor([1.0, 5.0, 2.0, 0.5]), torch.tensor([False, True, True, False])
    pair, mixed = pairwise_loss(error, prior, weight), mixed_loss(error, prior, weight)
    torch.testing.assert_close(mixed.total, pair.total / 2, rtol=1e-6, atol=0)
    assert mixed[1:] == pair[1:]


def test_mixed_takes_any_share_of_class_pictures() -> None:
    loss = mixed_loss(torch.tensor([4.0, 2.0, 6.0]), torch.tensor([False, True, True]), 0.5)
    assert loss.total.item() == pytest.approx((4 + 1 + 3) / 3)
    assert (loss.instance.item(), loss.prior.item()) == (4.0, 4.0)


@pytest.mark.parametrize("layout", [pairwise_loss, mixed_loss])
@pytest.mark.parametrize("all_prior", [False, True])
def test_a_batch_of_one_kind_is_finite(layout: object, all_prior: bool) -> None:
    loss = layout(torch.tensor([1.0, 3.0]), torch.tensor([all_prior] * 2), 1.0)  # type: ignore[operator]
    assert loss.total.item() == 2.0
    assert (loss.instance.item(), loss.prior.item()) == ((0.0, 2.0) if all_prior else (2.0, 0.0))


# ---- the prior that is the model itself --------------------------------------------------------------------------


CONFIGS = [
    LoraConfig(kind="lora", rank=4),
    LoraConfig(kind="lora", rank=4, text_encoder=True),
    FullConfig(kind="full", select="cross-attention"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_preservation_starts_at_zero_and_notices_change(family: ModelFamily, config: LoraConfig | FullConfig) -> None:
    adapter = attach(config, family, seed=0)
    batch = replace(make_batch(), class_captions=("a star",) * 4)
    assert torch.equal(preservation_error(family, adapter, batch, 1), torch.zeros(4))
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(0, name)))
    error = preservation_error(family, adapter, batch, 1)
    assert error.dtype == torch.float32
    assert bool((error > 0).all())
    error.mean().backward()
    trained = {id(p) for group in adapter.groups() for p in group.parameters.values()}
    assert {id(p) for p in family.networks.parameters() if p.grad is not None} == trained


def test_preservation_reads_the_class_captions(family: ModelFamily) -> None:
    adapter = attach(CONFIGS[0], family, seed=0)
    with torch.no_grad():
        for parameter in adapter.groups()[0].parameters.values():
            parameter.add_(0.2)
    batch = replace(make_batch(), class_captions=("a star",) * 4)
    spoken = preservation_error(family, adapter, batch, 1)
    assert not torch.equal(spoken, preservation_error(family, adapter, replace(batch, class_captions=("",) * 4), 1))
    assert torch.equal(spoken, preservation_error(family, adapter, replace(batch, captions=("",) * 4), 1))
    ahead = replace(batch, class_captions=None, class_prompt=family.encode_prompt(("a star",) * 4))
    assert torch.equal(spoken, preservation_error(family, adapter, ahead, 1))


@pytest.mark.parametrize("text_encoder", [False, True])
def test_text_encoder_feels_the_loss_only_where_it_trains(family: ModelFamily, text_encoder: bool) -> None:
    attach(LoraConfig(kind="lora", rank=4, text_encoder=text_encoder), family, seed=0)
    denoising_error(family, make_batch(), 1).mean().backward()
    assert any(p.grad is not None for p in family.networks["text_encoder"].parameters()) == text_encoder
    assert any(p.grad is not None for p in family.networks["denoiser"].parameters())


# ---- prompts of unlike lengths -----------------------------------------------------------------------------------


LONG = ("a red star on grass, " * 5, "a zib star", "a blue ring, " * 9 + "a star", "")


@pytest.mark.parametrize("sizes", [None, ((8, 8), (8, 8), (4, 8), (8, 8))])
def test_long_captions_are_what_they_would_be_alone(tiny_sd: Path, sizes: tuple[tuple[int, int], ...] | None) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd), prompt_chunks=3))
    family.require("denoiser", "text_encoder")
    adapter = attach(LoraConfig(kind="lora", rank=4, text_encoder=True), family, seed=0)
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, name)))
    batch = replace(make_batch(), captions=LONG, class_captions=LONG[::-1], sizes=sizes)
    ahead = Conditioning.stack([family.encode_prompt([caption]) for caption in batch.captions])
    assert ahead.lengths == (48, 24, 48, 24)
    error, kept = denoising_error(family, batch, 1), preservation_error(family, adapter, batch, 1)
    assert bool((kept > 0).all())
    torch.testing.assert_close(denoising_error(family, replace(batch, prompt=ahead), 1), error, rtol=1e-5, atol=1e-6)
    for row in range(4):
        alone = replace(make_batch((row,)), captions=(LONG[row],), class_captions=(LONG[3 - row],))
        if sizes:
            height, width = sizes[row]
            posterior = Posterior(
                mean=alone.posterior.mean[..., :height, :width], logvar=alone.posterior.logvar[..., :height, :width]
            )
            alone = replace(alone, posterior=posterior)
        torch.testing.assert_close(denoising_error(family, alone, 1), error[[row]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(preservation_error(family, adapter, alone, 1), kept[[row]], rtol=1e-3, atol=1e-6)
    (error.mean() + kept.mean()).backward()
    assert all(p.grad is not None for group in adapter.groups() for p in group.parameters.values())
