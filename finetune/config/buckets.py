"""What a recipe says of the sizes that pictures are cut to, and what in it cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from finetune.config.section import Section

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""


class BucketsConfig(Section):
    """Shapes that pictures are cut to, so that little of them is lost; squares alone where there is no such section."""

    step: PositiveInt = 64
    """Sides are multiples of it, in pixels."""
    smallest: PositiveInt | None = None
    """Shortest side; half the resolution where it is not set."""
    largest: PositiveInt | None = None
    """Longest side; twice the resolution where it is not set."""
    upscale: bool = True
    """Enlarge small pictures to fill a shape. Without it they keep their size, cut to multiples of `step`."""

    def limits(self, resolution: int) -> tuple[int, int]:
        """Shortest and longest side of a resolution's shapes, multiples of ``step``."""
        shortest, longest = self.smallest or resolution // 2, self.largest or 2 * resolution
        return max(self.step, -(-shortest // self.step) * self.step), longest // self.step * self.step


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about sizes that cannot be meant."""
    data = recipe.data
    sides = [data.resolution]
    for index, side in enumerate(data.more_resolutions):
        if side in sides:
            yield ("data", "more_resolutions", index), f"is {side}, which is there already: pictures would count twice"
        sides.append(side)
    if data.buckets is None:
        return
    at, step = ("data", "buckets"), data.buckets.step
    for side in dict.fromkeys(sides):
        shortest, longest = data.buckets.limits(side)
        if step > side:
            yield (*at, "step"), f"is {step}, more than the resolution {side}: no shape would fit"
        elif shortest > side:
            yield (*at, "smallest"), f"comes to {shortest}, more than the resolution {side}: only squares would be left"
        elif longest < side // step * step:
            yield (*at, "largest"), f"comes to {longest}, less than the resolution {side}: only squares would be left"
