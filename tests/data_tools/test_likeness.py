"""Copies are found and nothing else is, as fast search and brute force agree."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_tools.likeness import BLURRED, Look, alike, copies, look, near_pairs, sharpness
from finetune import tinyworld


def photo(seed: int, side: int = 96) -> Image.Image:
    """Something with large and small shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return Image.blend(image, fine, 0.15)


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def grouped(looks: list[Look]) -> list[list[int]]:
    return copies([one.hash for one in looks], lambda a, b: alike(looks[a], looks[b]))


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_the_search_by_bands_finds_what_brute_force_finds(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    near = hashes.copy()
    for index in range(200):  # neighbours of 1 to 8 bits
        for bit in rng.choice(64, 1 + index % 8, replace=False):
            near[index] ^= np.uint64(1) << np.uint64(bit)
    both = np.unique(np.concatenate([hashes, near]))
    brute = {
        (a, b)
        for a, b in itertools.combinations(range(len(both)), 2)
        if (int(both[a]) ^ int(both[b])).bit_count() <= distance
    }
    found = list(near_pairs(both, distance))
    assert set(found) == brute and len(found) == len(brute)
    assert bool(brute) == (distance > 0)


def test_copies_are_found_through_scaling_and_compression() -> None:
    originals = [photo(seed) for seed in range(12)]
    changed = [saved(one.resize((200, 200)), 40) for one in originals[:4]] + [saved(originals[0], 90)]
    looks = [look(one) for one in (*originals, *changed)]
    assert grouped(looks) == [[0, 12, 16], [1, 13], [2, 14], [3, 15]]


def test_pictures_that_share_a_hash_need_not_be_copies() -> None:
    """Gradients in one direction have the same hash, whatever their colours; a copy among them is still found."""
    ramp = Image.linear_gradient("L").rotate(90)
    red, blue = (
        Image.merge("RGB", [ramp if band == i else ramp.point(lambda _: 9) for i in range(3)]) for band in (0, 2)
    )
    looks = [look(one) for one in (red, blue, red.resize((90, 90)))]
    assert len({one.hash for one in looks}) == 1
    assert grouped(looks) == [[0, 2]]


def test_pictures_of_one_subject_are_no_copies() -> None:
    for seed in range(10):
        assert grouped([look(one) for one in tinyworld.instance_pictures(tinyworld.subject(seed))]) == []


def test_a_hundred_thousand_equal_hashes_are_joined_in_one_pass() -> None:
    asked = []
    found = copies([7] * 100_000, lambda a, b: bool(asked.append((a, b))) or True)
    assert [len(group) for group in found] == [100_000] and len(asked) == 99_999


def test_blur_is_told_from_dark_and_pale() -> None:
    sharp = photo(1, 256)
    blurred = sharp.filter(ImageFilter.GaussianBlur(5))
    dim = sharp.point(lambda value: 20 + value // 10)
    assert sharpness(blurred) < BLURRED < sharpness(sharp)
    assert sharpness(dim) == pytest.approx(sharpness(sharp), rel=0.3)
    assert sharpness(Image.new("RGB", (50, 50), "red")) == 0
    for seed in range(5):
        assert min(map(sharpness, tinyworld.instance_pictures(tinyworld.subject(seed)))) > 5 * BLURRED
