"""Geometry by hand, pixels in range, masks that lie where their pictures do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import decoding, images
from finetune.data.decoding import inspect
from finetune.data.framing import Crop, Size, cover
from finetune.data.sources import Picture
from finetune.errors import UserError


def picture(image: Image.Image, path: Path, mask: Path | str | None = None) -> Picture:
    image.save(path)
    return Picture("0/a", path, ("a",), inspect(path), mask)


def square(one: Picture, side: int) -> Crop:
    return cover(one.facts.width, one.facts.height, Size(side, side))


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"),
    [
        (640, 480, 512, (480, 640, 0, 85, 512, 512)),  # scaled to 683 x 512: 85 are cut at the left, 86 at the right
        (480, 640, 512, (640, 480, 85, 0, 512, 512)),
        (512, 512, 512, (512, 512, 0, 0, 512, 512)),
        (100, 300, 64, (300, 100, 64, 0, 64, 64)),
        (9, 8, 64, (8, 9, 0, 4, 64, 64)),
    ],
)
def test_geometry_as_computed_by_hand(
    width: int, height: int, side: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    one = picture(Image.new("RGB", (width, height)), tmp_path / "a.png")
    assert tuple(images.geometry(one, square(one, side)).tolist()) == expected


def test_the_mirrored_geometry_counts_from_the_other_side(tmp_path: Path) -> None:
    one = picture(Image.new("RGB", (640, 480)), tmp_path / "a.png")
    assert images.geometry(one, square(one, 512), flipped=True).tolist() == [480, 640, 0, 86, 512, 512]


def test_pixels_are_the_central_square_from_minus_one_to_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    wide, small = picture(image, tmp_path / "a.png"), picture(Image.new("RGB", (9, 9)), tmp_path / "b.png")
    assert torch.equal(images.pixels(wide, square(wide, 20)), torch.ones(3, 20, 20))
    assert torch.equal(images.pixels(small, square(small, 16)), -torch.ones(3, 16, 16))


def test_channels_rows_and_columns_keep_their_places(gradient: Image.Image, tmp_path: Path) -> None:
    one = picture(gradient, tmp_path / "a.png")
    found = images.pixels(one, square(one, 20))
    assert found.shape == (3, 20, 20)
    assert (found[0].diff(dim=1) > 0).all()  # red grows to the right
    assert (found[1].diff(dim=0) > 0).all()  # green grows downwards
    assert (found[2] == -1).all()


def test_a_bucket_keeps_what_the_square_cuts_away(gradient: Image.Image, tmp_path: Path) -> None:
    """Rows and columns of the crop are those of the picture: width and height are not exchanged anywhere."""
    one = picture(gradient.resize((60, 40)), tmp_path / "a.png")
    found = images.pixels(one, cover(60, 40, Size(24, 16)))
    assert found.shape == (3, 16, 24)
    whole = images.pixels(one, cover(60, 40, Size(60, 40)))
    assert found[0, 0, 0] - whole[0, 0, 0] < 0.05 and whole[0, 0, -1] - found[0, 0, -1] < 0.05
    assert (found[0].diff(dim=1) > 0).all() and (found[1].diff(dim=0) > 0).all()
    assert images.geometry(one, cover(60, 40, Size(24, 16))).tolist() == [40, 60, 0, 0, 16, 24]


def test_a_mask_is_cropped_like_its_picture_and_averaged_per_cell(tmp_path: Path) -> None:
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (10, 0, 15, 20))  # a quarter of the central square, from its left edge
    one = picture(mask.convert("RGB"), tmp_path / "a.png", mask=tmp_path / "mask.png")
    mask.save(tmp_path / "mask.png")
    found = images.mask(one, square(one, 20), scale=2)
    assert found.shape == (1, 10, 10)
    assert torch.equal(found[0, 0], torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0, 0, 0]))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert torch.equal(images.mask(replace(one, mask=None), square(one, 20), 2), torch.ones(1, 10, 10))


def test_a_mask_from_transparency(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((9, 9, 9, 255), (0, 0, 16, 8))
    one = picture(image, tmp_path / "a.png", mask="alpha")
    found = images.mask(one, square(one, 16), 2)
    assert torch.equal(found[0, :, 0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))


def test_a_mask_that_the_crop_cuts_away_is_an_error(tmp_path: Path) -> None:
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (0, 0, 5, 20))
    mask.save(tmp_path / "mask.png")
    one = picture(Image.new("RGB", (40, 20)), tmp_path / "a.png", mask=tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask.png: nothing of the mask is left in what is cut"):
        images.mask(one, square(one, 20), 2)


def test_a_picture_that_changes_under_a_run_is_an_error(tmp_path: Path) -> None:
    one = picture(Image.new("RGB", (16, 16)), tmp_path / "a.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has changed since this run began"):
        images.pixels(one, square(one, 16))


def photograph(width: int, height: int) -> Image.Image:
    """Coarse and fine, as photographs are."""
    rng = np.random.default_rng(0)
    parts = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((width, height)), float
        )
        for side in (4, 16, 64, 256)
    ]
    values = parts[0] * 0.5 + parts[1] * 0.25 + parts[2] * 0.15 + parts[3] * 0.1
    return Image.fromarray(values.round().astype(np.uint8))


def test_only_what_is_cut_is_scaled_and_looks_as_if_all_had_been(tmp_path: Path) -> None:
    one = picture(photograph(300, 170), tmp_path / "a.png")
    crop = square(one, 64)
    scaled = Image.open(one.path).resize((crop.width, crop.height), Image.Resampling.LANCZOS)
    expected = np.asarray(scaled.crop((crop.left, 0, crop.left + 64, 64)), dtype=int)
    found = ((images.pixels(one, crop) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1.01  # a last rounding


@pytest.mark.parametrize(("size", "shrink"), [((1024, 768), 4), ((1020, 768), 4), ((1022, 768), 2), ((1023, 768), 1)])
def test_a_large_jpeg_is_decoded_smaller_and_shows_the_same(
    size: tuple[int, int], shrink: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    photograph(*size).save(path, quality=95)
    one = Picture("0/a", path, ("a",), inspect(path))
    crop = square(one, 64)
    found, asked, real = images.pixels(one, crop), [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda content, path, shrink: asked.append(shrink) or real(content, path))
    whole = images.pixels(one, crop)
    assert asked == [shrink]
    error = (found - whole) * 127.5
    assert error.abs().max() <= 4 and error.pow(2).mean().sqrt() < 0.7 and error.mean().abs() < 0.1


def test_a_jpeg_that_is_not_twice_as_large_as_needed_is_decoded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photograph(240, 160).save(path)
    one = Picture("0/a", path, ("a",), inspect(path))
    assert [images._shrink(one, square(one, side)) for side in (10, 11, 20, 40, 41)] == [8, 4, 4, 2, 1]
