"""What is done to a mask's shape, against the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.masking.parts import Runs, filled, largest
from data_tools.masking.shape import Shape, grown


def parts_by_flooding(region: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    left, found = {(int(y), int(x)) for y, x in np.argwhere(region)}, []
    while left:
        part, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        found.append(part)
    return found


def drawn(parts: list[set[tuple[int, int]]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    region = np.zeros(shape, dtype=bool)
    for y, x in set().union(*parts):
        region[y, x] = True
    return region


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_parts_are_those_that_flooding_finds(share: float, seed: int) -> None:
    region = np.random.default_rng(seed).random((23, 17)) < share
    parts = parts_by_flooding(region)
    runs = Runs.of(region)
    assert sorted(area for area in runs.areas().tolist() if area) == sorted(map(len, parts))
    assert np.array_equal(largest(region), drawn([max(parts, key=len)], region.shape))
    inner = [part for part in parts_by_flooding(~region) if not any(y in (0, 22) or x in (0, 16) for y, x in part)]
    assert np.array_equal(filled(region), region | drawn(inner, region.shape))


def test_a_spiral_is_one_part() -> None:
    region = np.zeros((41, 41), dtype=bool)
    y = x = 20
    for turn in range(38):
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(2 * (turn // 2) // 2 * 2 // 2 + 2):
            y, x = y + down, x + right
            region[y, x] = True
    assert np.array_equal(largest(region), drawn([max(parts_by_flooding(region), key=len)], region.shape))


def test_nothing_stays_nothing() -> None:
    nothing = np.zeros((5, 7), dtype=bool)
    assert not largest(nothing).any() and not filled(nothing).any()
    assert filled(~nothing).all() and largest(~nothing).all()


def test_growing_takes_what_is_near() -> None:
    dot = np.zeros((41, 41), dtype=np.uint8)
    dot[20, 20] = 200
    wide = grown(dot, 10)
    down, across = np.mgrid[-20:21, -20:21]
    far = np.hypot(down, across)
    assert set(np.unique(wide)) == {0, 200}
    assert wide[20, 10] == wide[30, 20] == 200 and wide[20, 9] == wide[31, 20] == 0  # 10 pixels along the axes
    assert bool((wide[far <= 9.5] == 200).all()) and bool((wide[far > 11.2] == 0).all())
    assert np.array_equal(grown(dot, 0), dot)


def test_shrinking_is_growing_what_is_around_and_spares_the_edge_of_the_picture() -> None:
    half = np.zeros((20, 20), dtype=np.uint8)
    half[:, :10] = 255
    assert np.array_equal(grown(half, -3)[:, :7], half[:, :7]) and not grown(half, -3)[:, 7:].any()


def test_cut_soft_fill_and_feather() -> None:
    values = np.zeros((9, 9), dtype=np.float32)
    values[2:7, 2:7] = 0.8
    values[4, 4] = 0.1
    values[0, 0] = 0.6
    values[8, 8] = 0.3

    def bytes_of(**how: object) -> NDArray[np.uint8]:
        return np.asarray(Shape(**how).apply(values))  # type: ignore[arg-type]

    assert np.unique(bytes_of()).tolist() == [0, 255] and bytes_of()[0, 0] == 255 and bytes_of()[8, 8] == 0
    assert bytes_of(cut=0.7)[0, 0] == 0 and bytes_of(cut=0.3)[8, 8] == 255
    soft = bytes_of(soft=True, cut=0.2)
    assert (soft[3, 3], soft[4, 4], soft[0, 0], soft[8, 8]) == (204, 0, 153, 76)
    cleaned = bytes_of(soft=True, largest=True, fill=True)
    assert (cleaned[3, 3], cleaned[4, 4], cleaned[0, 0]) == (204, 255, 0)
    feathered = bytes_of(fill=True, largest=True, feather=1)
    assert 0 < feathered[1, 4] < feathered[2, 4] < feathered[4, 4] > 250
