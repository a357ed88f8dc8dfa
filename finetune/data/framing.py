"""Where pictures are cut: all to one square, or each to the nearest of several shapes ("buckets"). No torch.

Bucket lists are those of kohya's trainers, so that a set of pictures falls into the same shapes here and there.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log, sqrt
from typing import NamedTuple

from finetune.config.schema import DataConfig

SAME = 1e-8  # between logarithms of ratios that count as one


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        """Pixels of it."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


class Box(NamedTuple):
    """Pixels of a picture, from ``left`` and ``top`` up to but without ``right`` and ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int

    def scaled(self, old: Size, new: Size) -> Box:
        """The same part of a picture that is scaled from one size to another, rounded outwards."""
        left, right = self.left * new.width // old.width, -(-self.right * new.width // old.width)
        return Box(left, self.top * new.height // old.height, right, -(-self.bottom * new.height // old.height))


class Crop(NamedTuple):
    """A picture scaled to ``width`` x ``height``, of which ``target`` is cut ``left`` and ``top`` pixels in."""

    width: int
    height: int
    left: int
    top: int
    target: Size

    def __str__(self) -> str:
        return f"{self.target} at {self.left}, {self.top} of {self.width} x {self.height}"


def cover(width: int, height: int, target: Size) -> Crop:
    """Scale a picture until it covers ``target``, round to the nearest pixel and cut the rest evenly.

    An odd pixel is cut at the right and at the bottom.
    """
    scale = max(target.width / width, target.height / height)
    wide, high = max(target.width, int(width * scale + 0.5)), max(target.height, int(height * scale + 0.5))
    return Crop(wide, high, (wide - target.width) // 2, (high - target.height) // 2, target)


def moved(crop: Crop, across: float, down: float, keep: Box | None = None) -> Crop:
    """``crop`` at another place of the scaled picture.

    Args:
        across, down: the place, in [0, 1): 0 is as far to the left or up as can be.
        keep: pixels of the scaled picture, all of them if None. What is cut holds them where they fit into it, and else
            holds nothing but them; along each side by itself.
    """
    keep = keep or Box(0, 0, crop.width, crop.height)
    left = _offset(crop.width, crop.target.width, keep.left, keep.right, across)
    return crop._replace(left=left, top=_offset(crop.height, crop.target.height, keep.top, keep.bottom, down))


def _offset(whole: int, part: int, start: int, end: int, share: float) -> int:
    least, most = sorted((start, end - part))
    least, most = max(0, least), min(whole - part, most)
    return min(most, least + int(share * (most - least + 1)))


def bucket_sizes(resolution: int, step: int, smallest: int, largest: int) -> tuple[Size, ...]:
    """The shapes whose sides are multiples of ``step`` and whose area is ``resolution ** 2`` at most, sorted.

    For each width from ``smallest`` to ``largest`` the highest that fits, each also lying on its side, and the square.
    """
    area, side = resolution * resolution, resolution // step * step
    found = {Size(side, side)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            found |= {Size(width, height), Size(height, width)}
    return tuple(sorted(found))


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The one of ``sizes`` that is a picture's own, or else nearest in the logarithm of the ratio of its sides.

    Between equally near ones the larger is taken.
    """
    return Nearest(sizes).to(width, height)


class Nearest:
    """``nearest_size`` for many pictures: sizes in the order of the logarithms of their ratios."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        ordered = sorted((log(size.width / size.height), size) for size in sizes)
        self._ratios, self._sizes, self._all = [one[0] for one in ordered], [one[1] for one in ordered], set(sizes)

    def to(self, width: int, height: int) -> Size:
        """The size for a picture."""
        if (own := Size(width, height)) in self._all:
            return own
        ratio = log(width / height)
        place = bisect(self._ratios, ratio)
        below, above = self._ratios[max(0, place - 1)], self._ratios[min(place, len(self._ratios) - 1)]
        first, last = bisect_left(self._ratios, below - SAME), bisect(self._ratios, above + SAME)
        near = range(first, last)
        best = min(near, key=lambda i: (round(abs(self._ratios[i] - ratio), 9), -self._sizes[i].area))
        return self._sizes[best]


@dataclass(frozen=True)
class Framing:
    """How the pictures of a run are cut.

    Args:
        resolution: side of the square, or the root of the largest area.
        step: sides are multiples of it; None for squares alone.
        sizes: the buckets; one for squares.
        upscale: whether small pictures may be enlarged to fill a bucket.
    """

    resolution: int
    step: int | None
    sizes: tuple[Size, ...]
    upscale: bool = True

    @staticmethod
    def of(data: DataConfig, resolution: int | None = None) -> Framing:
        """What a recipe says, for one of its resolutions; the first where none is given."""
        side = resolution or data.resolution
        if data.buckets is None:
            return Framing(side, None, (Size(side, side),))
        step, smallest, largest = data.buckets.step, *data.buckets.limits(side)
        return Framing(side, step, bucket_sizes(side, step, smallest, largest), data.buckets.upscale)

    def crop(self, width: int, height: int) -> Crop:
        """Where a picture of this size is cut."""
        return self._crop(width, height)

    @cached_property
    def _crop(self) -> Callable[[int, int], Crop]:
        nearest = Nearest(self.sizes)

        @lru_cache(maxsize=65536)
        def crop(width: int, height: int) -> Crop:
            if self.step is None or self.upscale:
                return cover(width, height, nearest.to(width, height))
            return _without_enlarging(width, height, self.resolution**2, self.step)

        return crop


def _without_enlarging(width: int, height: int, area: int, step: int) -> Crop:
    """A picture as large as it is, or shrunk to ``area``; cut to multiples of ``step`` at its right and lower edges.

    Only one that is narrower than ``step`` is enlarged, to that.
    """
    wide, high = width, height
    if width * height > area:
        wide, high = _shrunk(width / height, area, step)
    target = Size(max(step, wide // step * step), max(step, high // step * step))
    if wide >= target.width and high >= target.height:
        return Crop(wide, high, (wide - target.width) // 2, (high - target.height) // 2, target)
    return cover(width, height, target)


def _shrunk(ratio: float, area: int, step: int) -> tuple[int, int]:
    """Not more than ``area``, with one side a multiple of ``step``: the one whose cut shape is nearer to ``ratio``."""
    width = max(step, int(sqrt(area * ratio)) // step * step)
    height = max(step, int(sqrt(area / ratio)) // step * step)

    def error(size: tuple[int, int]) -> float:
        wide, high = (max(1, side // step) for side in size)
        return abs(log(wide / high / ratio))

    return min((width, int(width / ratio)), (int(height * ratio), height), key=error)
