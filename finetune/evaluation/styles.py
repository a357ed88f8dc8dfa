"""How far pictures are in a style of the embedded world, whatever they show.

A style is known exactly: it turns the colours of a picture, and lays lines of one tint over it. So the question can be
put the other way round: does undoing the style leave a picture of the world? Two answers, each on a scale from plain
renders (0) to held-out renders in the style (1):

- *colours*: the mean over a period of lines is undone (the lines' share of the tint is known, the turn is inverted)
  and compared with the palette of the world, everything that its renders hold. Mean distance to the nearest colour.
- *lines*: how well the difference of covered and free rows agrees with what the style would make of this picture,
  ``2 Σ d·p / (Σ |d|² + Σ |p|²)``: Lin's concordance (1989) about zero, 1 only for lines of the right place, direction,
  colour and strength.

Fidelity is their product: colours without lines are half a style, and count as none of it. No reference picture is
compared pixel by pixel and no network is asked, so what a picture shows does not matter. Of pictures that should be
plain the larger part counts, because either of them is a trace of the style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.measures import normalised
from finetune.tinyworld import Scene, render, rng
from finetune.tinyworld.style import FLATNESS, OPACITY, Style

if TYPE_CHECKING:
    from PIL import Image

    Pictures = Sequence[Image.Image]

Array = NDArray[np.float64]
REFERENCES = 20  # renders that make each end of the scale
PALETTE_SCENES, PALETTE_LEVELS, SIDE = 300, 24, 8  # SIDE: of a window of the palette, in pixels


@dataclass(frozen=True)
class Scale:
    """A style's own scale: ``floor`` and ``ceiling`` are (colours, lines) of plain renders and of those in it."""

    style: Style
    floor: tuple[float, float]
    ceiling: tuple[float, float]

    @staticmethod
    def of(style: Style) -> Scale:
        """Measured on scenes that are in no training set."""
        scenes = [Scene.having({}, rng("style reference", style.seed, at)) for at in range(REFERENCES)]
        plain = [render(scene)[0] for scene in scenes]
        return Scale(style, _raw(style, plain), _raw(style, [style.apply(picture) for picture in plain]))

    def parts(self, pictures: Pictures) -> dict[str, float]:
        """Colours and lines of some pictures, each from 0 (plain) to 1 (in the style), never below 0."""
        found = zip(("colours", "lines"), _raw(self.style, pictures), self.floor, self.ceiling, strict=True)
        return {name: max(0.0, normalised(value, low, high)) for name, value, low, high in found}

    def fidelity(self, pictures: Pictures) -> float:
        """The product of both parts."""
        parts = self.parts(pictures)
        return parts["colours"] * parts["lines"]

    def trace(self, pictures: Pictures) -> float:
        """The larger part: how far pictures that should be plain are not."""
        return max(self.parts(pictures).values())


def undone(style: Style, picture: Image.Image) -> Image.Image:
    """The picture as it would be without the style: averaged over a period of lines, their tint and the turn undone."""
    from PIL import Image

    array = _across(style, picture)
    before = style.period // 2
    padded = np.pad(array, ((0, 0), (before, style.period - before), (0, 0)), mode="reflect")
    total = np.concatenate([np.zeros_like(padded[:, :1]), padded.cumsum(1)], axis=1)
    means = (total[:, style.period :] - total[:, : -style.period]) / style.period
    plain = _turned_back(style, means[:, : array.shape[1]]).clip(0, 1)
    return Image.fromarray(np.rint((plain if style.upright else plain.swapaxes(0, 1)) * 255).astype(np.uint8))


def readable(style: Style, pictures: Pictures) -> list[Image.Image]:
    """Each picture as a judge of the plain world should see it: undone where its colours or its lines are nearer to
    what the style would make of them than to the plain world's.
    """
    found = []
    for picture in pictures:
        halves = _windows(style, picture)
        means, (seen, expected) = halves.mean(2), _lines(style, halves)
        turned = _distance(_turned_back(style, means)) < _distance(means)
        lined = np.linalg.norm(seen - expected) < np.linalg.norm(seen)
        found.append(undone(style, picture) if turned or lined else picture)
    return found


def _raw(style: Style, pictures: Pictures) -> tuple[float, float]:
    """Colours as minus the distance to the palette, and lines as concordance; both higher in the style."""
    halves = [_windows(style, picture) for picture in pictures]
    colours = [_distance(_turned_back(style, half.mean(2))) for half in halves]
    pairs = [_lines(style, half) for half in halves]
    seen, expected = (np.stack(side) for side in zip(*pairs, strict=True))
    both = float((seen**2).sum() + (expected**2).sum())
    return -float(np.mean(colours)), 2 * float((seen * expected).sum()) / both


def _lines(style: Style, halves: Array) -> tuple[Array, Array]:
    """By how much covered rows differ from free ones, as seen and as the style would have it, (3,) each."""
    seen = (halves[:, :, 0] - halves[:, :, 1]).mean((0, 1))
    return seen, OPACITY * (_tint(style) - _freed(style, halves.mean((0, 1, 2))))


def _across(style: Style, picture: Image.Image) -> Array:
    """The picture in [0, 1], turned so that its lines run downwards."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return array if style.upright else array.swapaxes(0, 1)


def _windows(style: Style, picture: Image.Image) -> Array:
    """Means of the covered and the free half of every period, (rows, periods, 2, 3)."""
    array = _across(style, picture)
    half = style.period // 2
    rows, periods = array.shape[0] // SIDE, array.shape[1] // style.period
    cut = array[: rows * SIDE, : periods * style.period]
    return cut.reshape(rows, SIDE, periods, 2, half, 3).mean((1, 4))


def _tint(style: Style) -> Array:
    return np.array(style.tint) / 255


def _freed(style: Style, means: Array) -> Array:
    """What the mean of a period was before the lines covered half of it."""
    return (means - OPACITY / 2 * _tint(style)) / (1 - OPACITY / 2)


def _turned_back(style: Style, means: Array) -> Array:
    """Means of whole periods as plain colours."""
    plain: Array = (_freed(style, means) - 0.5) / FLATNESS @ style.turn + 0.5
    return plain


def _distance(colours: Array) -> float:
    """Mean distance of colours (…, 3) to the nearest of the world's."""
    flat, palette = colours.reshape(-1, 3), _palette()
    squared = (flat**2).sum(1)[:, None] - 2 * flat @ palette.T + (palette**2).sum(1)
    return float(np.sqrt(squared.min(1).clip(0)).mean())


@lru_cache(maxsize=1)
def _palette() -> Array:
    """Colours that windows of plain renders have, (N, 3)."""
    found = []
    for at in range(PALETTE_SCENES):
        picture = np.asarray(render(Scene.having({}, rng("palette", at)))[0], dtype=np.float64) / 255
        side = picture.shape[0] // SIDE
        found.append(picture.reshape(side, SIDE, side, SIDE, 3).mean((1, 3)).reshape(-1, 3))
    return np.unique(np.rint(np.concatenate(found) * PALETTE_LEVELS), axis=0) / PALETTE_LEVELS
