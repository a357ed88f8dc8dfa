"""Batches pair every picture with its caption, mask, geometry and weight."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from taken_batches import NOT_CACHED, PRIOR, Folder, Make, colour, equal

from finetune.data import prepare
from finetune.errors import UserError
from finetune.randomness import generator


@pytest.mark.parametrize("data", [{}, NOT_CACHED], ids=["cached", "not cached"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_hundred_batches_pair_pictures_and_captions(
    data: dict[str, Any], flip: bool, make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(7), data=data | {"flip": flip}, train={"batch_size": 3}, prior=PRIOR)
    family = fake()
    for batch in itertools.islice(prepare(recipe, family), 100):
        for row in range(3):
            index = colour(batch, row)
            assert batch.ids[row] == f"0/{index}.png"
            assert batch.captions[row] == f"a photo of zib number {index}"
        assert batch.captions[3:] == ("a star",) * 3
        assert batch.prior.tolist() == [False] * 3 + [True] * 3
        for row, caption in enumerate(batch.captions):
            expected = torch.randn(4, 3, generator=generator(0, caption))
            assert batch.prompt is not None
            assert torch.equal(batch.prompt.tokens[row], expected)


def test_masks_follow_their_pictures_and_leave_class_images_whole(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    photos, masks = folder(2), tmp_path / "masks"
    masks.mkdir()
    for index in range(2):
        mask = Image.new("L", (24, 24), 0)
        mask.paste(255, (0, 0, 24, 12) if index == 0 else (0, 0, 12, 24))
        mask.save(masks / f"{index}.png")
    recipe = make_recipe(
        photos, concept={"masks": str(masks)}, data={"flip": True, "unmasked_weight": 0.25}, prior=PRIOR
    )
    seen = set()
    for batch in itertools.islice(prepare(recipe, fake()), 40):
        assert batch.mask is not None
        assert batch.mask.shape == (2, 1, 8, 8)
        assert torch.equal(batch.mask[1], torch.ones(1, 8, 8))
        top, left, right = (float(part.mean()) for part in (batch.mask[0, 0, :4], *batch.mask[0, 0].chunk(2, dim=-1)))
        seen.add((batch.ids[0], top, left, right))
    assert seen == {
        ("0/0.png", 1.0, 0.625, 0.625),
        ("0/1.png", 0.625, 1.0, 0.25),
        ("0/1.png", 0.625, 0.25, 1.0),  # mirrored with its picture
    }


def test_some_draws_leave_the_mask_out_each_by_itself(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    photos, masks = folder(2), tmp_path / "masks"
    masks.mkdir()
    for index in range(2):
        mask = Image.new("L", (24, 24), 0)
        mask.paste(255, (0, 0, 24, 12))
        mask.save(masks / f"{index}.png")

    def whole(probability: float, **train: Any) -> dict[int, bool]:
        data = {"unmasked_weight": 0.25, "unmasked_probability": probability}
        recipe = make_recipe(photos, concept={"masks": str(masks)}, data=data, train=train)
        found = {}
        for batch in itertools.islice(prepare(recipe, fake()), 200 // (train or {"batch_size": 1})["batch_size"]):
            assert batch.mask is not None
            for row, draw in enumerate(batch.draws):
                shares = batch.mask[row, 0, :4].mean(), batch.mask[row, 0, 4:].mean()
                assert shares in ((1.0, 1.0), (1.0, 0.25))
                found[draw] = shares == (1.0, 1.0)
        return found

    some = whole(0.3, batch_size=1)
    assert 40 <= sum(some.values()) <= 80 and whole(0.3, batch_size=4) == some
    assert not any(whole(0.0, batch_size=4).values())


def test_mirroring_mirrors_half_of_the_draws(make_recipe: Make, tmp_path: Path, fake: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    image.save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    mirrored = 0
    for batch in itertools.islice(prepare(make_recipe(photos, data={"flip": True}), fake()), 200):
        left, right = (float(part.mean()) for part in batch.posterior.mean[0].chunk(2, dim=-1))
        assert {left, right} == {-1.0, 1.0}
        mirrored += right == 1.0
    assert 79 <= mirrored <= 121  # three sigma


def test_geometry_is_each_picture_s_own_and_class_images_have_theirs(
    make_recipe: Make, tmp_path: Path, fake: Any
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 48)).save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    batch = next(iter(prepare(make_recipe(photos, prior=PRIOR), fake())))
    assert batch.geometry.dtype == torch.int64
    assert batch.geometry.tolist() == [[48, 64, 0, 2, 16, 16], [16, 16, 0, 0, 16, 16]]


def test_the_model_as_prior_gets_class_captions_instead_of_pictures(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(3), prior={"kind": "model"}, train={"batch_size": 2})
    for batch in itertools.islice(prepare(recipe, fake()), 5):
        assert batch.class_captions == ("a star", "a star")
        assert not batch.prior.any()
        assert batch.class_prompt is not None
        assert torch.equal(batch.class_prompt.tokens[1], torch.randn(4, 3, generator=generator(0, "a star")))


def test_the_model_as_prior_needs_a_class_prompt(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), prior={"kind": "model"}, concept={"class_prompt": None})
    with pytest.raises(UserError, match="prior preservation needs class_prompt"):
        prepare(recipe, fake())


def test_caption_dropout_spares_class_images(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(3), prior=PRIOR, data={"caption_dropout": 0.5})
    drawn = [batch.captions for batch in itertools.islice(prepare(recipe, fake()), 100)]
    assert {captions[1] for captions in drawn} == {"a star"}
    assert 35 <= sum(captions[0] == "" for captions in drawn) <= 65


def test_a_list_of_captions_is_drawn_from_and_all_are_encoded_ahead(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    photos = folder(1)
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    family = fake()
    batches = prepare(make_recipe(photos), family)
    assert sorted(family.captions) == ["one", "two"]
    assert {batch.captions[0] for batch in itertools.islice(batches, 40)} == {"one", "two"}


def test_a_batch_moves_to_a_device_whole(make_recipe: Make, folder: Folder, fake: Any) -> None:
    batch = next(iter(prepare(make_recipe(folder(2)), fake())))
    assert equal(batch.to("cpu"), batch)
    assert batch.weight.dtype == torch.float32
    assert batch.prior.dtype == torch.bool


def test_notes_tell_of_cut_captions_and_enlarged_pictures(
    make_recipe: Make, folder: Folder, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    photos = folder(3)
    (photos / "1.txt").write_text("zib " + "word " * 14)
    counts = prepare(make_recipe(photos, data={"resolution": 32}), fake()).describe()
    assert counts["captions_cut"] == 1
    assert "3 of 3 pictures are smaller than 32 pixels and are enlarged" in counts["notes"]
    assert "1 of 3 captions are too long" in caplog.text
    assert "loses 3 tokens" in caplog.text


def test_a_resolution_that_the_model_cannot_take(make_recipe: Make, folder: Folder, fake: Any) -> None:
    with pytest.raises(UserError, match=r"data.resolution is 18; .* multiple of 4: 16 or 20"):
        prepare(make_recipe(folder(2), data={"resolution": 18}), fake())
