"""Connected parts of a region, in NumPy alone: the region's rows as runs, and runs that touch joined. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.masking.way import Region

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """A region as stretches of its rows, in reading order.

    Attributes:
        shape: height and width of the picture.
        row, start, end: of each stretch, [N]; ``end`` is the first column behind it.
        part: number of the connected part (by edges, not by corners) that each belongs to, [N].
    """

    shape: tuple[int, int]
    row: Indices
    start: Indices
    end: Indices
    part: Indices

    @staticmethod
    def of(region: Region) -> Runs:
        """Find them."""
        high, wide = region.shape
        steps = np.diff(region.astype(np.int8), axis=1, prepend=0, append=0)
        row, start = np.nonzero(steps == 1)
        end = np.nonzero(steps == -1)[1]
        return Runs((high, wide), row, start, end, _joined(row * (wide + 1) + start, row * (wide + 1) + end, wide + 1))

    def areas(self) -> Indices:
        """Pixels of each part, by its number."""
        return np.bincount(self.part, weights=self.end - self.start).astype(np.int64)

    def at_the_edge(self) -> Indices:
        """Numbers of the parts that touch the edge of the picture."""
        high, wide = self.shape
        touching = (self.row == 0) | (self.row == high - 1) | (self.start == 0) | (self.end == wide)
        return np.unique(self.part[touching])

    def drawn(self, parts: Indices) -> Region:
        """The region of some of the parts."""
        kept = np.isin(self.part, parts)
        high, wide = self.shape
        steps = np.zeros((high, wide + 1), dtype=np.int8)
        steps[self.row[kept], self.start[kept]] += 1
        steps[self.row[kept], self.end[kept]] -= 1
        return np.cumsum(steps, axis=1, dtype=np.int8)[:, :wide].astype(bool)


def largest(region: Region) -> Region:
    """The largest connected part of a region; of equally large ones the one that comes first."""
    runs = Runs.of(region)
    return runs.drawn(np.array([runs.areas().argmax()])) if len(runs.part) else region


def filled(region: Region) -> Region:
    """A region with its holes: places that nothing connects with the edge of the picture."""
    outside = Runs.of(~region)
    return ~outside.drawn(outside.at_the_edge())


def _joined(starts: Indices, ends: Indices, row: int) -> Indices:
    """Number of the part of each run: of those that touch, the lowest index.

    Args:
        starts, ends: places of the runs in one long row.
        row: places from one row to the next.
    """
    first = np.searchsorted(ends, starts + row, side="right")
    behind = np.searchsorted(starts, ends + row, side="left")
    touching = np.maximum(behind - first, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(first, touching)
    part = np.arange(len(starts))
    while True:
        least = np.minimum(part[upper], part[lower])
        known = part.copy()
        for side in (upper, lower):
            np.minimum.at(known, part[side], least)  # the root learns of a lower one
            np.minimum.at(known, side, least)
        known = known[known]
        if np.array_equal(known, part):
            return part
        part = known
