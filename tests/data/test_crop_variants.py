"""Pictures that are cut at several places: each draw at one of them, with its own geometry and mask."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import ranks
from taken_batches import Make, equal, steps

from finetune.batch import Batch
from finetune.config.crop import CropConfig
from finetune.config.schema import DataConfig
from finetune.data import Batches, images, prepare, scan
from finetune.data.decoding import Facts
from finetune.data.entries import Entry, at_draw, subject_entries, variants
from finetune.data.framing import Box, Crop, Size, cover, moved
from finetune.data.sources import Picture
from finetune.errors import UserError

RANDOM: dict[str, Any] = {"crop": {"position": "random", "variants": 3}}


def entry(width: int = 640, height: int = 480, side: int = 512, box: Box | None = None, name: str = "0/a") -> Entry:
    facts = Facts(sha256=name, bytes=1, width=width, height=height, transparent=False, frames=1)
    picture = Picture(name, Path("a.png"), ("a",), facts, mask_box=box)
    return Entry(picture, cover(width, height, Size(side, side)))


def random(count: int) -> CropConfig:
    return CropConfig(position="random", variants=count)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures twice as wide as high, or high as wide; their red tells the column and their green the row."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, (width, height) in enumerate([(64, 32), (32, 64), (80, 32)]):
        right, down = np.meshgrid(3 * np.arange(width), 3 * np.arange(height))
        Image.fromarray(np.stack([right, down, 0 * right + index], -1).astype(np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"zib {index}", encoding="utf-8")
    return folder


def taken(batches: Batches, count: int = 30) -> list[Batch]:
    return list(itertools.islice(batches, count))


def test_a_cut_lies_within_the_picture_and_reaches_both_ends() -> None:
    center = cover(640, 480, Size(512, 512))
    assert moved(center, 0, 0) == Crop(683, 512, 0, 0, Size(512, 512))
    assert moved(center, 1 - 2**-53, 0.9).left == 171 == 683 - 512
    assert {moved(center, share / 1000, 0).left for share in range(1000)} == set(range(172))


def test_what_must_be_kept_is_held_where_it_fits_and_fills_the_cut_where_it_does_not() -> None:
    center = cover(200, 100, Size(100, 100))
    for share in (step / 50 for step in range(50)):
        assert 10 <= moved(center, share, 0, Box(70, 0, 110, 100)).left <= 70
        assert 20 <= moved(center, share, 0, Box(20, 0, 190, 100)).left <= 90
    lefts = [moved(center, share, 0, Box(0, 0, 5, 100)).left for share in (0.0, 0.999)]
    assert lefts == [0, 0], "nothing is left of it further to the right"


def test_a_box_is_scaled_outwards() -> None:
    assert Box(1, 1, 2, 3).scaled(Size(4, 4), Size(6, 2)) == Box(1, 0, 3, 2)


def test_cuts_are_spread_and_a_larger_number_keeps_those_that_are_there() -> None:
    four, eight = (variants(entry(2000, 480), random(count)) for count in (4, 8))
    assert eight[:4] == four
    lefts = sorted(one.crop.left for one in eight)
    gaps = [right - left for left, right in itertools.pairwise([0, *lefts, 2133 - 512])]
    assert max(gaps) < (2133 - 512) / 4, "twice as far as if they were even"
    assert variants(entry(), CropConfig()) == [entry()]


def test_cuts_belong_to_the_picture_and_the_choice_among_them_to_the_draw() -> None:
    places = {name: [one.crop.left for one in variants(entry(name=name), random(3))] for name in ("0/a", "0/b")}
    assert places["0/a"] != places["0/b"]
    chosen = [[at_draw(entry(), random(3), seed, draw).crop.left for draw in range(60)] for seed in (0, 1)]
    assert chosen[0] != chosen[1] and set(chosen[0]) == set(chosen[1]) == set(places["0/a"])


def test_time_ids_of_640_by_480_at_512_follow_cut_and_mirror() -> None:
    center = entry()
    assert images.geometry(center.picture, center.crop).tolist() == [480, 640, 0, 85, 512, 512]
    assert images.geometry(center.picture, center.crop, flipped=True).tolist() == [480, 640, 0, 86, 512, 512]
    for one in variants(center, random(5)):
        left = one.crop.left
        assert images.geometry(one.picture, one.crop).tolist() == [480, 640, 0, left, 512, 512]
        assert images.geometry(one.picture, one.crop, flipped=True).tolist() == [480, 640, 0, 171 - left, 512, 512]


@pytest.mark.parametrize("more", [{}, {"buckets": {"step": 4}}], ids=["squares", "buckets"])
def test_cached_uncached_and_resumed_are_equal_bit_for_bit(
    more: dict[str, Any], make_recipe: Make, photos: Path, fake: Any
) -> None:
    data = RANDOM | {"flip": True, "resolution": 16} | more
    first, again, uncached = (
        prepare(make_recipe(photos, data=data | cache, train={"batch_size": 2}), fake())
        for cache in ({}, {}, {"cache": {"latents": False}})
    )
    assert again.describe()["latents_made"] == 0
    rows = zip(taken(first), taken(again), taken(uncached), again.from_step(0), strict=False)
    assert all(equal(one, other) for one, *others in rows for other in others)
    assert all(equal(one, other) for one, other in zip(taken(first)[7:], again.from_step(7), strict=False))


def test_pixels_and_geometry_of_a_draw_are_of_the_same_place(make_recipe: Make, photos: Path, fake: Any) -> None:
    recipe = make_recipe(photos, data=RANDOM | {"flip": True, "resolution": 32}, train={"batch_size": 3})
    seen: dict[str, set[int]] = {}
    for batch in taken(prepare(recipe, fake())):
        for row, name in enumerate(batch.ids):
            height, width, top, left, *_ = batch.geometry[row].tolist()
            red, green = ((batch.posterior.mean[row, channel] + 1) * 127.5 / 3 for channel in (0, 1))
            mirrored = bool(red[0, 0] > red[0, 1])
            first = float(red[0, -1 if mirrored else 0]) - 0.5
            assert first == pytest.approx(width - 32 - left if mirrored else left, abs=0.1)
            assert float(green[0, 0]) - 0.5 == pytest.approx(top, abs=0.1)
            seen.setdefault(name, set()).add(round(max(first, top)))
            assert (height, width) in ((32, 64), (64, 32), (32, 80))
    assert all(len(places) == 3 for places in seen.values()), "every variant has its turn"


def test_order_and_number_of_processes_stay_as_they_were(make_recipe: Make, photos: Path, fake: Any) -> None:
    data = RANDOM | {"buckets": {"step": 4}}
    train = {"batch_size": 4}
    center = prepare(make_recipe(photos, data={"buckets": {"step": 4}}, train=train), fake())
    whole = prepare(make_recipe(photos, data=data, train=train), fake())
    half = make_recipe(photos, data=data, train={"batch_size": 2})
    halves = [prepare(half, fake(), processes) for processes in ranks(2)]
    for step in range(10):
        (one,) = steps(whole, step, 1)[0]
        assert one.ids == center.batch(step).ids and one.sizes == center.batch(step).sizes
        both = [(name, *row) for prepared in halves for name, row in _placed(prepared.batch(step))]
        assert sorted(both) == sorted((name, *row) for name, row in _placed(one))


def _placed(batch: Batch) -> list[tuple[str, list[int]]]:
    return list(zip(batch.ids, batch.geometry.tolist(), strict=True))


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Of which the left eighth counts, or the upper one."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for index, (width, height) in enumerate([(64, 32), (32, 64), (80, 32)]):
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 8, height) if width > height else (0, 0, width, height // 8))
        mask.save(folder / f"{index}.png")
    return folder


def test_a_cut_keeps_what_the_mask_counts(make_recipe: Make, photos: Path, masks: Path, fake: Any) -> None:
    concept = {"masks": str(masks)}
    with pytest.raises(UserError, match=r"0.png: nothing of the mask is left .*16 x 16 at 8, 0 of 32 x 16"):
        prepare(make_recipe(photos, concept=concept), fake())
    batches = prepare(make_recipe(photos, concept=concept, data=dict(RANDOM)), fake())
    for batch in taken(batches):
        assert batch.mask is not None and (batch.mask.flatten(1).sum(1) > 0).all()
        for row, one in enumerate(batch.ids):
            kept = batch.mask[row, 0]
            wide = "1.png" not in one
            top, left = batch.geometry[row, 2:4].tolist()
            inside = kept[:, 0] if wide else kept[0]
            assert torch.equal(inside > 0, torch.ones(8, dtype=torch.bool)), (one, top, left)


def test_a_mask_with_a_hole_that_some_cut_falls_into_is_refused(make_recipe: Make, tmp_path: Path, fake: Any) -> None:
    photos, masks = tmp_path / "holes", tmp_path / "hole masks"
    photos.mkdir(), masks.mkdir()
    Image.new("RGB", (400, 16)).save(photos / "a.png")
    mask = Image.new("L", (400, 16))
    mask.paste(255, (0, 0, 4, 16)), mask.paste(255, (396, 0, 400, 16))
    mask.save(masks / "a.png")
    concept = {"masks": str(masks), "prompt": "zib"}
    with pytest.raises(UserError, match=r"a.png: nothing of the mask is left in what is cut"):
        prepare(make_recipe(photos, concept=concept, data=dict(RANDOM)), fake())


def test_the_scan_knows_where_a_mask_counts(photos: Path, masks: Path) -> None:
    data = DataConfig.model_validate({"concepts": [{"folder": str(photos), "masks": str(masks)}], "resolution": 16})
    concepts = scan(data)
    assert [picture.mask_box for picture in concepts[0].pictures] == [(0, 0, 8, 32), (0, 0, 32, 8), (0, 0, 10, 32)]
    assert len(subject_entries(data, concepts)[0]) == 3


def test_own_class_pictures_are_cut_likewise_and_drawn_ones_are_whole(
    make_recipe: Make, photos: Path, tmp_path: Path, fake: Any
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (200, 16)).save(own / "star.png")
    for folder, places in ((str(own), 3), (None, 1)):
        prior = {"kind": "images", "count": 1, "folder": folder, "sampler": {"steps": 1}}
        batches = prepare(make_recipe(photos, data=dict(RANDOM), prior=prior), fake())
        lefts = {
            int(batch.geometry[row, 3]) for batch in taken(batches) for row in torch.nonzero(batch.prior).flatten()
        }
        assert len(lefts) == places
