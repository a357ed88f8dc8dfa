"""Masks without a model, against the true masks of the embedded world and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.masking.plain import from_border, otsu, threshold, transparency
from data_tools.masking.shape import Shape
from data_tools.masking.way import Photo
from finetune.errors import UserError
from finetune.tinyworld.subject import instance_scenes, subject


def photo(image: Image.Image) -> Photo:
    return Photo(Path("a.png"), image)


def test_subjects_of_the_embedded_world_are_found_before_their_gradients() -> None:
    shares = []
    for seed in range(10):
        for picture, mask in map(subject(seed).render, instance_scenes(subject(seed))):
            found = np.asarray(Shape(fill=True, largest=True).apply(threshold("border")(photo(picture)))) > 127
            true = np.asarray(mask) > 127
            shares.append((found & true).sum() / (found | true).sum())
    assert np.mean(shares) > 0.95
    assert np.mean(np.array(shares) > 0.9) > 0.85


def test_a_background_that_changes_evenly_has_no_distance() -> None:
    down, across = np.mgrid[0:40, 0:60]
    pixels = np.stack([2 * across + down, 200 - 3 * down, 50 + 0 * down], axis=-1).astype(np.uint8)
    np.testing.assert_allclose(from_border(pixels), 0, atol=1e-4)
    pixels[10:20, 10:20, 2] += 30
    np.testing.assert_allclose(from_border(pixels)[10:20, 10:20], 30, atol=1e-4)


def test_otsu_makes_the_variance_between_the_classes_largest() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(60, 9, 700), rng.normal(180, 20, 300)]).astype(np.float32)

    def between(at: float) -> float:
        low, high = values[values <= at], values[values > at]
        return float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(at) for at in np.sort(values)[1:-1])
    assert between(otsu(values)) > 0.999 * best
    assert 0.25 < otsu(np.array([0, 0, 1], dtype=np.float32)) < 0.75  # in the middle of what is all as good
    same = np.full(5, 3, dtype=np.float32)
    assert not (same > otsu(same)).any()


def test_dark_and_light() -> None:
    image = Image.new("RGB", (20, 20), (200, 200, 190))
    image.paste((40, 30, 20), (5, 5, 10, 15))
    dark, light = (threshold(kind)(photo(image)) for kind in ("dark", "light"))
    assert dark.sum() == 50 and bool((dark[5:15, 5:10] == 1).all())
    assert np.array_equal(light, 1 - dark)
    with pytest.raises(UserError, match="expected one of border, dark, light"):
        threshold("bright")


def test_transparency_is_the_mask() -> None:
    image = Image.new("RGBA", (10, 8), (255, 0, 0, 0))
    image.putpixel((3, 2), (0, 0, 0, 255))
    image.putpixel((4, 2), (0, 0, 0, 51))
    values = transparency(photo(image))
    assert values.shape == (8, 10) and values[2, 3] == 1 and values[2, 4] == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"a.png: has no transparency"):
        transparency(photo(Image.new("RGB", (10, 8))))
