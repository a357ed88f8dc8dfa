"""Pictures as they are drawn: each with where it is cut, once for every resolution; and in which order. No torch."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finetune.config.crop import CropConfig
from finetune.config.schema import DataConfig, ImagesPrior, Recipe
from finetune.data.framing import Crop, Framing, Size, moved
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
from finetune.randomness import derive

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: its multiples, without their whole parts, keep far from each other

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


def variants(entry: Entry, crop: CropConfig) -> list[Entry]:
    """All that draws of ``entry`` can show: itself, or its picture cut at several places."""
    return [entry] if crop.position == "center" else [_variant(entry, number) for number in range(crop.variants)]


def at_draw(entry: Entry, crop: CropConfig, seed: int, draw: int) -> Entry:
    """What draw number ``draw`` of a run shows of ``entry``."""
    if crop.position == "center":
        return entry
    return _variant(entry, derive(seed, "crop", entry.picture.id, draw) % crop.variants)


def _variant(entry: Entry, number: int) -> Entry:
    """A picture's cut of that number: a function of its content, so that runs of all seeds find it in the cache.

    The first cut lies at a place of the picture's own, and the next ones far from all before, so that a larger number
    of variants keeps those that are there. A masked picture's cut keeps what its mask counts.
    """
    picture, crop = entry.picture, entry.crop
    start = (derive(0, f"crop {axis}", picture.facts.sha256) / 2**63 for axis in ("across", "down"))
    across, down = ((own + number * GOLDEN) % 1 for own in start)
    old, new = Size(picture.facts.width, picture.facts.height), Size(crop.width, crop.height)
    keep = picture.mask_box and picture.mask_box.scaled(old, new)
    return replace(entry, crop=moved(crop, across, down, keep))


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
