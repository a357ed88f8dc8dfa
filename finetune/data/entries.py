"""Pictures as they are drawn: each with where it is cut, once for every resolution; and in which order. No torch."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune.config.schema import DataConfig, ImagesPrior, Recipe
from finetune.data.framing import Crop, Framing, Size
from finetune.data.sampler import (
    CLASS_ORDER,
    MIXED_ORDER,
    Balanced,
    Fixed,
    Grouped,
    Items,
    Mixed,
    Order,
    Pairwise,
    Plain,
)
from finetune.data.sources import Concept, Picture

ENLARGED = 1.5  # times and more are probably a mistake


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture and where it is cut.

    Attributes:
        class_prompt: of its concept, where it has one.
    """

    picture: Picture
    crop: Crop
    class_prompt: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what is cut."""
        return self.crop.target


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Pictures that are cut to one size in pixels.

    Attributes:
        cut_away: mean share of a picture's area that is lost.
    """

    width: int
    height: int
    pictures: int
    cut_away: float


def shapes(entries: Iterable[Entry]) -> list[Shape]:
    """How many pictures are cut to each size, narrow ones first."""
    lost: dict[Size, list[float]] = defaultdict(list)
    for crop in (entry.crop for entry in entries):
        lost[crop.target].append(1 - crop.target.area / (crop.width * crop.height))
    return [
        Shape(width=size.width, height=size.height, pictures=len(shares), cut_away=sum(shares) / len(shares))
        for size, shares in sorted(lost.items())
    ]


def subject_entries(data: DataConfig, concepts: Sequence[Concept]) -> list[list[Entry]]:
    """Those of each concept: its pictures, one after the other, each at every resolution."""
    framings = [Framing.of(data, side) for side in (data.resolution, *data.more_resolutions)]
    return [
        [
            Entry(picture, framing.crop(picture.facts.width, picture.facts.height), concept.config.class_prompt)
            for picture in concept.pictures
            for framing in framings
        ]
        for concept in concepts
    ]


def class_entries(data: DataConfig, classes: Sequence[Picture]) -> list[Entry]:
    """Pictures of the class, at the first resolution."""
    framing = Framing.of(data)
    return [Entry(picture, framing.crop(picture.facts.width, picture.facts.height)) for picture in classes]


def draws_per_epoch(recipe: Recipe, concepts: Sequence[Concept]) -> int:
    """Subject pictures of an epoch."""
    times = 1 + len(recipe.data.more_resolutions)
    return len(_items(recipe, concepts, [times * len(concept.pictures) for concept in concepts]))


def order(
    recipe: Recipe,
    concepts: Sequence[Concept],
    subjects: Sequence[Sequence[Entry]],
    classes: Sequence[Entry],
    unit: int,
) -> Order:
    """The order that a recipe's prior and sizes ask for.

    Args:
        subjects: entries of each concept.
        unit: draws per optimizer step, over all processes.
    """
    items = _items(recipe, concepts, [len(entries) for entries in subjects])
    flat, seed, prior = list(itertools.chain.from_iterable(subjects)), recipe.seed, recipe.prior
    one_size = len({entry.size for entry in (*flat, *classes)}) == 1

    def subject_size(epoch: int, place: int) -> tuple[int, int]:
        return flat[items.of(epoch, place)].size

    places = None if one_size else Grouped(len(items), unit, subject_size, seed)
    if not isinstance(prior, ImagesPrior):
        return Plain(items, seed, places)
    if prior.layout == "pairwise":
        of_class = None if one_size else Grouped(len(classes), unit, lambda _, i: classes[i].size, seed, CLASS_ORDER)
        return Pairwise(items, len(classes), seed, places, of_class)
    mixed = Mixed(items, len(classes), seed)
    if one_size:
        return mixed

    def mixed_size(epoch: int, place: int) -> tuple[int, int]:
        drawn = mixed.placed(0, epoch, place)
        return (classes if drawn.prior else flat)[drawn.item].size

    return Mixed(items, len(classes), seed, Grouped(2 * len(items), unit, mixed_size, seed, MIXED_ORDER))


def _items(recipe: Recipe, concepts: Sequence[Concept], counts: Sequence[int]) -> Items:
    """The subjects' entries: balanced, or each as often as its concept repeats."""
    ends = list(itertools.accumulate(counts))
    groups = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    if recipe.data.balance:
        return Balanced(groups, recipe.seed)
    repeated = zip(groups, concepts, strict=True)
    return Fixed([item for group, concept in repeated for item in list(group) * concept.config.repeats])
