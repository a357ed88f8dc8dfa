"""Pictures of several shapes in one run: each at its own size, in the same step, with the loss of each alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import ranks
from torch import Tensor

from finetune.batch import Batch, Conditioning, Posterior
from finetune.config.schema import Recipe
from finetune.data import Batches, prepare
from finetune.denoise import denoising_error
from finetune.errors import UserError
from finetune.objectives import DDPM, Denoising

Make = Callable[..., Recipe]
BUCKETS: dict[str, Any] = {"buckets": {"step": 4}}
SHAPES = [(24, 24), (36, 18), (18, 36), (36, 18), (24, 24), (24, 24), (50, 25)]
PRIOR: dict[str, Any] = {"kind": "images", "count": 6, "batch_size": 3, "sampler": {"steps": 1}}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Pictures whose red says their index, as their captions do."""
    path = tmp_path / "shapes"
    path.mkdir()
    for index, size in enumerate(SHAPES):
        Image.new("RGB", size, (20 * index, 128, 128)).save(path / f"{index}.png")
        (path / f"{index}.txt").write_text(f"zib number {index}", encoding="utf-8")
    return path


def taken(batches: Batches, count: int, first: int = 0) -> list[Batch]:
    return list(itertools.islice(batches.from_step(first), count))


class Teller:
    """A family whose denoiser answers the latents that it sees, and remembers their shapes."""

    objective = Denoising(DDPM(torch.linspace(0.99, 0.01, 10)))

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def scale(self, latents: Tensor) -> Tensor:
        return latents

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        self.seen.append(tuple(noisy.shape))
        assert (geometry[:, 4] // 2 == noisy.shape[2]).all() and (geometry[:, 5] // 2 == noisy.shape[3]).all()
        return noisy + prompt.tokens.mean((1, 2))[:, None, None, None]


@pytest.mark.parametrize("prior", [None, PRIOR, PRIOR | {"layout": "mixed"}], ids=["none", "pairwise", "mixed"])
def test_each_picture_is_its_own_size_and_has_its_own_caption(
    prior: dict[str, Any] | None, make_recipe: Make, shapes: Path, fake: Any
) -> None:
    recipe = make_recipe(shapes, data=BUCKETS, prior=prior, train={"batch_size": 3})
    batches = prepare(recipe, fake())
    for batch in taken(batches, 40):
        heights = batch.sizes or ((batch.posterior.mean.shape[2], batch.posterior.mean.shape[3]),) * len(batch)
        for row, (height, width) in enumerate(heights):
            mean = batch.posterior.mean[row]
            assert not mean[:, height:].any() and not mean[:, :, width:].any()
            assert batch.geometry[row, 4:].tolist() == [2 * height, 2 * width]
            if not batch.prior[row]:
                index = int(batch.captions[row].rsplit(" ", 1)[1])
                assert torch.allclose((mean[0, :height, :width] + 1) * 127.5, torch.tensor(20.0 * index), atol=0.1)
                ratio = SHAPES[index][0] / SHAPES[index][1]
                assert (width > height) == (ratio > 1) and (width < height) == (ratio < 1)


def test_the_loss_of_a_sample_is_that_of_the_sample_alone(make_recipe: Make, shapes: Path, fake: Any) -> None:
    """So the mean over a batch of several sizes weighs every picture alike, whatever was computed together."""
    batches = prepare(make_recipe(shapes, data=BUCKETS, prior=PRIOR, train={"batch_size": 7}), fake())
    batch = batches.batch(0)
    family = Teller()
    error = denoising_error(family, batch, seed=5)  # type: ignore[arg-type]
    assert batch.sizes is not None and len(error) == len(batch) == 14
    assert len(family.seen) == len(set(batch.sizes)) == len({shape[2:] for shape in family.seen})
    drawn = [one for number in range(7) for one in batches.order.at(number)]
    for place, one in enumerate(sorted(drawn, key=lambda one: one.prior)):
        single = batches._assemble([one])
        assert single.ids == batch.ids[place : place + 1] and single.sizes is None
        torch.testing.assert_close(denoising_error(Teller(), single, seed=5)[0], error[place])  # type: ignore[arg-type]


def test_masks_are_cut_with_their_pictures(make_recipe: Make, shapes: Path, fake: Any, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for index, (width, height) in enumerate(SHAPES):
        mask = Image.new("L", (width, height), 0)
        mask.paste(255, (0, 0, width // 2, height))  # the left half
        mask.save(masks / f"{index}.png")
    recipe = make_recipe(shapes, data=BUCKETS, concept={"masks": str(masks)}, train={"batch_size": 7})
    batch = prepare(recipe, fake()).batch(0)
    assert batch.sizes is not None and batch.mask is not None
    for row, (height, width) in enumerate(batch.sizes):
        half = batch.mask[row, 0, :height, :width]
        assert half[:, : width // 2].min() > 0.9 and half[:, -(width // 2) :].max() < 0.1 + (width % 2)
        assert not batch.mask[row, 0, height:].any() and not batch.mask[row, 0, :, width:].any()


def test_each_picture_once_per_epoch_and_resolution(make_recipe: Make, shapes: Path, fake: Any) -> None:
    recipe = make_recipe(shapes, data=BUCKETS | {"more_resolutions": [24]}, train={"batch_size": 2})
    batches = prepare(recipe, fake())
    drawn = [
        (name, target)
        for batch in taken(batches, 14)
        for name, target in zip(batch.ids, map(tuple, batch.geometry[:, 4:].tolist()), strict=True)
    ]
    assert batches.describe()["draws_per_epoch"] == 14 == len(set(drawn[:14]))
    assert Counter(drawn) == dict.fromkeys(drawn, 2)
    areas = {name: sorted(h * w for other, (h, w) in set(drawn) if other == name) for name, _ in drawn}
    assert all(small <= 16 * 16 < large <= 24 * 24 for small, large in areas.values())


def test_the_cache_holds_each_shape_and_its_mirror(make_recipe: Make, shapes: Path, fake: Any) -> None:
    recipe = make_recipe(shapes, data=BUCKETS | {"flip": True}, train={"batch_size": 4})
    family = fake()
    cached = taken(prepare(recipe, family), 10)
    assert family.pictures == 2 * len(SHAPES)
    again = fake()
    assert _same(taken(prepare(recipe, again), 10), cached) and again.pictures == 0
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"buckets": None})})
    other = fake()
    taken(prepare(plain, other), 1)
    assert other.pictures > 0, "a square must not be taken from the cache of another shape"


def test_one_process_and_two_draw_the_same(make_recipe: Make, shapes: Path, fake: Any) -> None:
    whole = prepare(make_recipe(shapes, data=BUCKETS, train={"batch_size": 4}), fake())
    half = make_recipe(shapes, data=BUCKETS, train={"batch_size": 2})
    halves = [prepare(half, fake(), processes) for processes in ranks(2)]
    for step in range(12):
        both = [name for prepared in halves for name in prepared.batch(step).ids]
        assert sorted(both) == sorted(whole.batch(step).ids)


def test_a_step_that_does_not_fit_the_model_is_refused(make_recipe: Make, shapes: Path, fake: Any) -> None:
    with pytest.raises(UserError, match=r"data.buckets.step is 6; .* needs a multiple of 4: 4 or 8"):
        prepare(make_recipe(shapes, data={"buckets": {"step": 6}}), fake())
    with pytest.raises(UserError, match=r"data.more_resolutions is 18; .* needs a multiple of 4: 16 or 20"):
        prepare(make_recipe(shapes, data={"more_resolutions": [18]}), fake())


def _same(some: list[Batch], others: list[Batch]) -> bool:
    def posterior(batch: Batch) -> Posterior:
        return batch.posterior

    return all(
        one.ids == other.ids
        and one.sizes == other.sizes
        and torch.equal(posterior(one).mean, posterior(other).mean)
        and torch.equal(one.geometry, other.geometry)
        for one, other in zip(some, others, strict=True)
    )
