"""Mistakes that other DreamBooth trainers make or made, one test each: METHODS 3.6, by its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.batch import Batch
from finetune.config.objective import MinSnrWeighting, ObjectiveConfig
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig
from finetune.data import prepare
from finetune.denoise import denoising_error, pairwise_loss, spoil
from finetune.families import load_family
from finetune.objectives import DDPM, refined
from finetune.randomness import generator
from finetune.sampling import draw

Make, Folder = Callable[..., Recipe], Callable[..., Path]
PRIOR = {"kind": "images", "count": 4}
MIN_SNR = ObjectiveConfig(weighting=MinSnrWeighting(kind="min_snr", gamma=5.0))


def half(batch: Batch, prior: bool) -> Batch:
    """The subject's or the class's rows of a batch, as a batch of its own."""
    rows = torch.nonzero(batch.prior == prior).flatten()
    keep = [int(row) for row in rows]
    assert batch.prompt is not None
    return Batch(
        ids=tuple(batch.ids[row] for row in keep),
        draws=tuple(batch.draws[row] for row in keep),
        captions=tuple(batch.captions[row] for row in keep),
        posterior=type(batch.posterior)(mean=batch.posterior.mean[rows], logvar=batch.posterior.logvar[rows]),
        prior=batch.prior[rows],
        weight=batch.weight[rows],
        geometry=batch.geometry[rows],
        prompt=batch.prompt.rows(rows),
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sd_v"])
def test_1_min_snr_weighs_both_halves_by_their_own_times(
    base: str, batch_size: int, make_recipe: Make, folder: Folder, request: pytest.FixtureRequest
) -> None:
    model = {"path": str(request.getfixturevalue(base))}
    recipe = make_recipe(folder(4), prior=PRIOR, model=model, train={"batch_size": batch_size})
    weighted, plain = (load_family(ModelConfig(**model), objective) for objective in (MIN_SNR, None))
    batch = next(iter(prepare(recipe, weighted)))
    plain.require("denoiser")
    errors = denoising_error(plain, batch, recipe.seed)
    times = spoil(weighted, batch, recipe.seed).timesteps
    assert len(times) == len(batch) == 2 * batch_size
    process = weighted.process
    assert isinstance(process, DDPM)
    kept = process.alphas_cumprod[times]
    snr = kept / (1 - kept)
    weights = snr.clamp(max=5.0) / (snr if process.prediction == "epsilon" else snr + 1)
    loss = pairwise_loss(denoising_error(weighted, batch, recipe.seed), batch.prior, 1.0)
    torch.testing.assert_close(loss.instance, (weights * errors)[~batch.prior].mean())
    torch.testing.assert_close(loss.prior, (weights * errors)[batch.prior].mean())
    for prior, part in ((False, loss.instance), (True, loss.prior)):
        alone = denoising_error(weighted, half(batch, prior), recipe.seed).mean()
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["pairwise", "mixed"])
def test_2_every_row_has_its_own_caption_whatever_the_batch(
    layout: str, make_recipe: Make, folder: Folder, fake: Any
) -> None:
    concept = {"prompt": "a zib star"}
    recipe = make_recipe(
        folder(4, captions=False), prior=PRIOR | {"layout": layout}, train={"batch_size": 3}, concept=concept
    )
    for batch in itertools.islice(prepare(recipe, fake()), 10):
        wanted = ["a star" if prior else "a zib star" for prior in batch.prior.tolist()]
        assert list(batch.captions) == wanted
        expected = torch.stack([torch.randn(4, 3, generator=generator(0, text)) for text in wanted])
        assert batch.prompt is not None and torch.equal(batch.prompt.tokens, expected)


def test_3_class_images_have_their_own_geometry(make_recipe: Make, tmp_path: Path, fake: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (96, 48)).save(photos / "a.png")
    (photos / "a.txt").write_text("a zib star")
    batch = next(iter(prepare(make_recipe(photos, prior=PRIOR), fake())))
    sizes = {bool(prior): row[:4] for prior, row in zip(batch.prior, batch.geometry.tolist(), strict=True)}
    assert sizes[False] == [48, 96, 0, 8], "original height and width, crop top and left"
    assert sizes[True] == [16, 16, 0, 0], "of a picture that was drawn at the resolution itself"


def test_4_min_snr_of_v_prediction_divides_by_snr_plus_one() -> None:
    kept = torch.tensor([0.999, 0.5, 0.01])
    snr = kept / (1 - kept)
    weight = refined(DDPM(kept, "v_prediction"), MIN_SNR).weigh(torch.arange(3))
    torch.testing.assert_close(weight, snr.clamp(max=5.0) / (snr + 1))
    assert not torch.allclose(weight, snr.clamp(max=5.0) / snr + 1), "the form that a script of others has"


def test_5_a_cached_latent_belongs_to_its_picture_in_every_order(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(6), train={"batch_size": 2})
    first = {}
    for _ in range(2):  # a cache that is made, and one that is read by another run in another order
        recipe = recipe.model_copy(update={"seed": recipe.seed + 1})
        for batch in itertools.islice(prepare(recipe, fake()), 30):
            for row, name in enumerate(batch.ids):
                mean = first.setdefault(name, batch.posterior.mean[row])
                assert torch.equal(mean, batch.posterior.mean[row])
                assert batch.captions[row] == f"a photo of zib number {Path(name).stem}"
    assert len(first) == 6


def test_6_mirroring_is_drawn_anew_for_every_draw(make_recipe: Make, tmp_path: Path, fake: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    image.save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    batches = itertools.islice(prepare(make_recipe(photos, data={"flip": True}), fake()), 20)
    seen = [bool(batch.posterior.mean[0, 0, 0, 0] > 0) for batch in batches]
    assert {True, False} == set(seen), "one picture is seen both ways in one run"


def test_7_no_warm_up_is_longer_than_a_run(make_recipe: Make, folder: Folder) -> None:
    assert make_recipe(folder(1)).train.schedule.warmup_steps == 0


def test_8_a_preview_draws_without_dropout_and_leaves_no_trace(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    family.networks["denoiser"].train()
    for module in family.networks["denoiser"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    state = torch.random.get_rng_state()
    sampler = SamplerConfig(steps=2, guidance=1.0)
    first, again = (draw(family, ["a star"], 1, sampler, 0, resolution=16)[0].tobytes() for _ in range(2))
    assert first == again
    assert family.networks["denoiser"].training
    assert torch.equal(torch.random.get_rng_state(), state)
