"""Which pictures are copies of one another: a 64 bit hash to find candidates, and a small picture to be sure. No torch.

The hash says for 8 rows of 9 grey values whether each is darker than the next (a difference hash). Scaling and another
compression change few of its bits. Pictures of smooth gradients can share it without being alike, so candidates are
compared once more, value by value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 4
"""Bits in which the hashes of copies may differ."""

DIFFERENCE = 6.0
"""Mean difference of copies' values in a picture of 16 x 16, of 255."""

BLURRED = 0.01
"""Sharpness below which a picture is called blurred, as a photograph is that was blurred by a hundredth of its side."""

BITS, SIDE = 64, 16
PAIRS = 1 << 22  # compared at a time

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Look:
    """How a picture looks: ``hash`` of 64 bits, and ``small``, int16 [16, 16, 3]."""

    hash: int
    small: NDArray[np.int16]


def look(image: Image.Image) -> Look:
    """How an RGB picture looks."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).ravel()
    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return Look(int.from_bytes(np.packbits(bits).tobytes(), "big"), small)


def alike(one: Look, other: Look, distance: int = DISTANCE) -> bool:
    """Whether two pictures are copies of one another."""
    near = (one.hash ^ other.hash).bit_count() <= distance
    return near and float(np.abs(one.small - other.small).mean()) <= DIFFERENCE


def near_pairs(hashes: Hashes, distance: int = DISTANCE) -> Iterator[tuple[int, int]]:
    """Indices of all pairs of different hashes that differ in at most ``distance`` bits, each once, the lower first.

    Hashes are cut into ``distance + 1`` bands: two that differ in ``distance`` bits agree in one of them, so only those
    that agree somewhere are compared.

    Args:
        hashes: uint64 [N], no two equal.
    """
    edges = [BITS * band // (distance + 1) for band in range(distance + 2)]
    bands = list(itertools.pairwise(edges))
    for number, band in enumerate(bands):
        for left, right in _candidates(_part(hashes, band)):
            differing = hashes[left] ^ hashes[right]
            near = np.bitwise_count(differing) <= distance
            for earlier in bands[:number]:  # a pair that agrees there was given then
                near &= _part(differing, earlier) != 0
            for a, b in zip(left[near].tolist(), right[near].tolist(), strict=True):
                yield (a, b) if a < b else (b, a)


def _part(values: Hashes, band: tuple[int, int]) -> Hashes:
    start, end = band
    return (values >> np.uint64(start)) & np.uint64((1 << (end - start)) - 1)


def _candidates(values: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Indices of pairs of equal values, many at a time."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate(([True], values[order][1:] != values[order][:-1])))
    ends = np.append(starts[1:], len(order))
    for start, end in zip(starts, ends, strict=True):
        run = order[start:end]
        rows = max(1, PAIRS // max(1, len(run)))
        for first in range(0, len(run) - 1, rows):
            some = np.arange(first, min(first + rows, len(run) - 1))
            left = np.repeat(some, len(run) - 1 - some)
            right = np.concatenate([np.arange(one + 1, len(run)) for one in some])
            yield run[left], run[right]


def copies(hashes: Sequence[int], certain: Callable[[int, int], bool], distance: int = DISTANCE) -> list[list[int]]:
    """Groups of pictures that are copies of one another, directly or through others, as sorted indices.

    Args:
        hashes: of the pictures.
        certain: has the last word on two pictures whose hashes are near, by their indices.
    """
    parents = list(range(len(hashes)))

    def root(of: int) -> int:
        while parents[of] != of:
            parents[of] = parents[parents[of]]
            of = parents[of]
        return of

    def join(a: int, b: int) -> bool:
        first, second = root(a), root(b)
        if first != second and certain(a, b):
            parents[max(first, second)] = first = second = min(first, second)
        return first == second

    different: dict[int, list[int]] = {}  # hash -> pictures that share it and are no copies
    for index, value in enumerate(hashes):
        known = different.setdefault(value, [])
        if not any(join(one, index) for one in known):
            known.append(index)
    unique = list(different)
    for one, other in near_pairs(np.array(unique, dtype=np.uint64), distance):
        for a, b in itertools.product(different[unique[one]], different[unique[other]]):
            join(a, b)
    found: dict[int, list[int]] = {}
    for index in range(len(hashes)):
        found.setdefault(root(index), []).append(index)
    return [members for members in found.values() if len(members) > 1]


def around(members: Sequence[int], certain: Callable[[int, int], bool]) -> Iterator[list[int]]:
    """Split a chain of copies into groups whose first member is like every other one.

    Copies of copies can differ: of the frames of a slow film each is like the next, and the last unlike the first.

    Args:
        members: of one group of ``copies``; those that should stand first come first.
        certain: as of ``copies``.
    """
    rest = list(members)
    while rest:
        first, *others = rest
        near = {one for one in others if certain(first, one)}
        if near:
            yield [first, *(one for one in others if one in near)]
        rest = [one for one in others if one not in near]


def sharpness(image: Image.Image) -> float:
    """How much of a picture's contrast is between neighbouring pixels, at a size of 256 pixels at most.

    The variance of the Laplacian, as usual for finding blur, over the variance of the picture, so that a dark or pale
    picture is not taken for a blurred one; 0 for a picture of one colour.
    """
    grey = image.convert("L")
    grey.thumbnail((256, 256), Image.Resampling.LANCZOS)
    values = np.asarray(grey, dtype=np.float64)
    spread = float(values.var())
    if min(values.shape) < 3 or spread < 1:
        return 0.0
    middle = values[1:-1, 1:-1]
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * middle
    return float(laplacian.var()) / spread
