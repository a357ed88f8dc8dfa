"""Cached batches are those that are not, what has changed is encoded anew, and memory is used in phases."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from taken_batches import NOT_CACHED, PRIOR, Folder, Make, equal, family_folder
from torch import Tensor

from finetune.data import prepare
from finetune.denoise import denoising_error
from finetune.errors import GuardError
from finetune.family import ModelFamily


def test_cached_and_uncached_batches_are_equal_bit_for_bit(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    photos = folder(5)
    settings = {"flip": True, "caption_dropout": 0.3}
    batches = [
        prepare(make_recipe(photos, data=settings | more, train={"batch_size": 2}, prior=PRIOR), fake())
        for more in ({}, {}, NOT_CACHED, {"cache": {"latents": False}}, {"cache": {"text": False}})
    ]
    assert batches[0].describe()["latents_made"] > 0
    assert batches[1].describe()["latents_made"] == 0
    for rows in zip(*(itertools.islice(one, 20) for one in batches), strict=True):
        assert all(equal(rows[0], row) for row in rows[1:])


@pytest.mark.parametrize("text", [True, False])
def test_losses_of_a_real_model_are_equal_cached_and_not(
    text: bool, make_recipe: Make, folder: Folder, tiny_family: ModelFamily
) -> None:
    photos, losses = folder(3), []
    for cache in ({}, {"latents": False, "text": text}):
        recipe = make_recipe(photos, data={"flip": True, "cache": cache}, train={"batch_size": 2})
        batches = prepare(recipe, tiny_family)
        with torch.no_grad():
            losses.append([denoising_error(tiny_family, batch, 0) for batch in itertools.islice(batches, 20)])
        tiny_family.release("denoiser", "vae", "text_encoder")
    assert all(torch.equal(cached, other) for cached, other in zip(*losses, strict=True))


def test_phases_keep_no_more_in_memory_than_they_need(make_recipe: Make, folder: Folder, fake: Any) -> None:
    family = fake()
    prepare(make_recipe(folder(3)), family)
    assert family.together == {frozenset({"text_encoder"}), frozenset({"vae"}), frozenset({"denoiser"})}
    assert set(family.networks) == {"denoiser"}
    warm = fake()
    prepare(make_recipe(family_folder(family, folder)), warm)
    assert warm.together == {frozenset({"denoiser"})}  # all was read, so no encoder was loaded
    assert (warm.pictures, warm.captions) == (0, [])


def test_a_text_encoder_that_trains_stays_and_prompts_are_left_to_it(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    family = fake()
    recipe = make_recipe(folder(3), adapter={"kind": "lora", "text_encoder": True})
    batch = next(iter(prepare(recipe, family)))
    assert batch.prompt is None
    assert batch.class_prompt is None
    assert family.captions == []
    assert set(family.networks) == {"denoiser", "text_encoder"}


def test_an_edited_picture_or_caption_is_encoded_again_alone(make_recipe: Make, folder: Folder, fake: Any) -> None:
    photos = folder(4)
    prepare(make_recipe(photos), fake())
    Image.new("RGB", (24, 24), "red").save(photos / "2.png")
    (photos / "1.txt").write_text("another caption")
    family = fake()
    batches = prepare(make_recipe(photos), family)
    assert family.captions == ["another caption"]
    assert family.pictures == 1
    counts = batches.describe()
    assert (counts["latents_read"], counts["latents_made"]) == (3, 1)
    assert (counts["prompts_read"], counts["prompts_made"]) == (3, 1)


def test_damaged_packs_are_made_again(make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path) -> None:
    recipe = make_recipe(folder(3))
    whole = list(itertools.islice(prepare(recipe, fake()), 10))
    for pack in (tmp_path / "cache").rglob("*.safetensors"):
        pack.write_bytes(pack.read_bytes()[:-3])
    batches = prepare(recipe, fake())
    for kind in ("latents", "prompts"):
        counts = batches.describe()
        assert (counts[f"{kind}_damaged"], counts[f"{kind}_made"]) == (1, 3), "a pack of three entries each"
    assert all(equal(first, second) for first, second in zip(whole, batches, strict=False))


def test_what_an_interrupted_run_left_in_the_cache_is_removed(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "latents" / ".partial-1234-abcd"
    left.mkdir(parents=True)
    (left / "tensors").write_bytes(b"half")
    prepare(make_recipe(folder(2)), fake())
    assert left.exists()  # another run may be writing it
    os.utime(left, (0, 0))
    prepare(make_recipe(folder(2, "again")), fake())
    assert not left.exists()


def test_16_bits_are_rounded_cached_or_not(make_recipe: Make, folder: Folder, fake: Any) -> None:
    photos = folder(3)
    whole = prepare(make_recipe(photos), fake())
    for dtype in (torch.bfloat16, torch.float16):
        cache = {"dtype": str(dtype).removeprefix("torch.")}
        batches = [
            prepare(make_recipe(photos, data={"cache": cache | more}), fake()) for more in ({}, {}, {"latents": False})
        ]
        for exact, *rows in itertools.islice(zip(whole, *batches, strict=False), 10):
            assert all(torch.equal(row.posterior.mean, exact.posterior.mean.to(dtype).float()) for row in rows)
            assert all(torch.equal(row.posterior.logvar, exact.posterior.logvar.to(dtype).float()) for row in rows)


def test_an_encoder_that_breaks_down_names_the_picture(make_recipe: Make, folder: Folder, fake: Any) -> None:
    family, encode = fake(), fake.encode_image

    def broken(pixels: Tensor) -> Any:
        posterior = encode(family, pixels)
        posterior.mean[0, 0, 0, 0] = float("nan")
        return posterior

    family.encode_image = broken
    with pytest.raises(GuardError, match=r"0.png: the image encoder gives numbers that are not finite"):
        prepare(make_recipe(folder(2)), family)
