"""Shapes and where pictures are cut, against tables made by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from finetune.config.schema import BucketsConfig, DataConfig
from finetune.data.framing import Crop, Framing, Size, bucket_sizes, cover, nearest_size

SQUARE_512 = [  # width -> the highest multiple of 64 with width * height <= 512 * 512
    (256, 1024),
    (320, 768),
    (384, 640),
    (448, 576),
    (512, 512),
    (576, 448),
    (640, 384),
    (704, 320),
    (768, 320),
    (832, 256),
    (896, 256),
    (960, 256),
    (1024, 256),
]


def framing(resolution: int = 512, **buckets: Any) -> Framing:
    concept = {"folder": "a", "prompt": "a"}
    return Framing.of(DataConfig(concepts=[concept], resolution=resolution, buckets=BucketsConfig(**buckets)))  # type: ignore[list-item]


def test_the_list_of_512_by_64_is_the_one_made_by_hand() -> None:
    found = bucket_sizes(512, 64, 256, 1024)
    assert set(found) == {*SQUARE_512, *((height, width) for width, height in SQUARE_512)}
    assert framing().sizes == found
    assert list(found) == sorted(set(found))


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (1024, 16), (500, 64), (64, 8)])
def test_every_shape_keeps_to_step_area_and_limits(resolution: int, step: int) -> None:
    low, high = BucketsConfig(step=step).limits(resolution)
    for width, height in bucket_sizes(resolution, step, low, high):
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution
        assert low <= min(width, height) and max(width, height) <= high


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((1024, 256), (1024, 256)),  # a shape of the list itself
        ((1920, 1080), (640, 384)),  # 1.778: 704 x 320 is 2.2 (ln 0.213), 640 x 384 is 1.667 (ln 0.065)
        ((1080, 1920), (384, 640)),
        ((3000, 2000), (640, 384)),  # 1.5: 640 x 384 is 1.667 (ln 0.105), 576 x 448 is 1.286 (ln 0.154)
        ((2000, 3000), (384, 640)),
        ((1600, 1200), (576, 448)),  # 1.333
        ((600, 500), (576, 448)),  # 1.2: 576 x 448 is 1.286 (ln 0.069), the square is ln 0.182 away
        ((5000, 500), (1024, 256)),  # wider than any
    ],
)
def test_ten_sizes_fall_where_a_hand_puts_them(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    """By the nearest logarithm of the ratio of sides: from 2:1 it is as far to 1:1 as to 4:1."""
    assert framing().crop(*size).target == bucket


def test_equally_near_shapes_go_to_the_larger() -> None:
    assert nearest_size(100, 100, [Size(64, 64), Size(128, 128)]) == (128, 128)
    assert nearest_size(300, 100, [Size(100, 50), Size(450, 100)]) == (450, 100)  # ln 1.5 from either


def test_a_picture_covers_its_shape_and_the_rest_is_cut_evenly() -> None:
    assert cover(1000, 500, Size(640, 384)) == Crop(768, 384, 64, 0, Size(640, 384))  # wider: heights match
    assert cover(500, 1000, Size(384, 640)) == Crop(384, 768, 0, 64, Size(384, 640))
    assert cover(641, 481, Size(512, 512)) == Crop(682, 512, 85, 0, Size(512, 512))  # 682.3


def test_every_picture_covers_its_shape() -> None:
    for frame in (framing(64, step=8), framing(64, step=8, upscale=False)):
        for width in range(8, 200, 7):
            for height in range(8, 200, 11):
                crop = frame.crop(width, height)
                assert crop.left + crop.target.width <= crop.width and crop.top + crop.target.height <= crop.height
                assert crop.target.width % 8 == crop.target.height % 8 == 0
                assert crop.target.area <= 64 * 64
                assert abs(math.log(crop.width / crop.height * height / width)) < 0.07  # one pixel of the shorter side


def test_without_enlarging_small_pictures_keep_their_size() -> None:
    keeps = framing(64, step=8, upscale=False)
    assert keeps.crop(50, 43) == Crop(50, 43, 1, 1, Size(48, 40))
    assert framing(64, step=8).crop(50, 43).width > 50
    large = keeps.crop(400, 200)  # shrunk to about the area: 88 x 44 or 80 x 40, of which 88 x 40 or 80 x 40 is cut
    assert large == Crop(80, 40, 0, 0, Size(80, 40))
    assert keeps.crop(6, 50).target == (8, 48)  # narrower than a step


def test_squares_where_no_buckets_are_asked_for() -> None:
    data = DataConfig(concepts=[{"folder": "a", "prompt": "a"}], resolution=96)  # type: ignore[list-item]
    assert Framing.of(data).crop(300, 200) == Crop(144, 96, 24, 0, Size(96, 96))
    assert Framing.of(data, 64).crop(300, 200).target == (64, 64)


def test_the_nearest_of_many_shapes_is_found_as_if_all_were_compared() -> None:
    shapes = [bucket_sizes(512, 64, 256, 1024), bucket_sizes(96, 8, 16, 400), (Size(2, 1), Size(4, 2), Size(1, 2))]
    for sizes in shapes:
        for width, height in itertools.product(range(9, 900, 37), range(9, 900, 41)):
            ratio = math.log(width / height)
            expected = min(
                sizes, key=lambda size: (round(abs(math.log(size.width / size.height) - ratio), 9), -size.area)
            )
            assert nearest_size(width, height, sizes) == (expected if (width, height) not in sizes else (width, height))
