"""What is wrong with a set of pictures, what is doubtful, and how it will be cut. Loads no weights.

What a run would refuse comes from the very code that a run begins with, so the two can't disagree.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.likeness import BLURRED, Look, alike, around, copies, look, sharpness
from finetune.config import Recipe, read_recipe
from finetune.config.adapters import new_words
from finetune.config.schema import ConceptConfig, DataConfig
from finetune.data import decoding, wording
from finetune.data.ahead import ahead, cores
from finetune.data.entries import ENLARGED, Entry, Shape, shapes, subject_entries
from finetune.data.facts import Known
from finetune.data.sources import Concept, Picture, Survey, survey
from finetune.errors import UserError, nearest

Level = Literal["refused", "doubtful", "note"]
LEVELS: tuple[Level, ...] = ("refused", "doubtful", "note")
LONGEST = 75
"""Words and marks of a caption that Stable Diffusion's text encoder can read at most, one token each."""

MOST_CAPTIONS = 2000  # that are compared with one another


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        level: "refused" ends a run before it begins, "doubtful" is probably a mistake, "note" only wants to be known.
        kind: such as "blurred", for programs.
        text: a sentence.
        pictures: ids of those that it is about.
    """

    level: Level
    kind: str
    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All of it.

    Attributes:
        source: the folder or recipe.
        pictures: those that can be used, by id.
        sharpness: of each of them (``likeness.sharpness``).
        dropped: how many of them a run would leave out, which is none: it refuses or uses what it finds.
    """

    source: str
    pictures: dict[str, Picture]
    sharpness: dict[str, float]
    findings: tuple[Finding, ...]
    shapes: tuple[Shape, ...]
    dropped: int = 0

    def at(self, level: Level) -> list[Finding]:
        """The findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "pictures": len(self.pictures),
            "sharpness": self.sharpness,
            "dropped": self.dropped,
            "findings": [asdict(finding) for finding in self.findings],
            "shapes": [asdict(shape) for shape in self.shapes],
        }


def diagnose(
    source: Path, overrides: Sequence[str] = (), resolution: int = 512, workers: int | None = None
) -> Diagnosis:
    """Look at a folder of pictures, or at all that a recipe names.

    Args:
        overrides: of the recipe.
        resolution: where a folder alone is looked at.
        workers: threads that decode; as many as there are cores where it is not set.

    Raises:
        UserError: there is no such folder or recipe, or the recipe is wrong.
    """
    recipe = None if source.is_dir() else _recipe(source, overrides)
    data = recipe.data if recipe else DataConfig(concepts=[ConceptConfig(folder=str(source))], resolution=resolution)
    captioned = recipe is not None and recipe.adapter.kind != "aesthetic"  # which reads no captions
    found = survey(
        data,
        captioned=captioned,
        words=new_words(recipe.adapter) if recipe else None,
        known=None if recipe else Known(None),  # a folder alone has no cache
        workers=workers,
    )
    pictures = {picture.id: picture for concept in found.concepts for picture in concept.pictures}
    entries = list(itertools.chain.from_iterable(subject_entries(data, found.concepts)))
    findings = [Finding("refused", "refused", problem) for problem in found.problems]
    if recipe is not None and captioned:
        findings += _unfit(recipe, found, entries)
    seen = dict(_seen(pictures.values(), workers or cores()))
    sharp = {name: value for name, (_, value) in seen.items()}
    findings += _copies(list(pictures.values()), [one for one, _ in seen.values()])
    findings += _blurred(pictures, sharp)
    findings += _sizes(entries)
    for concept in found.concepts:
        findings += _captions(concept, data)
    findings += _long(recipe, pictures.values(), data)
    return Diagnosis(str(source), pictures, sharp, tuple(findings), tuple(shapes(entries)))


def _recipe(source: Path, overrides: Sequence[str]) -> Recipe:
    if not source.exists():
        near = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"{source}: no such folder or recipe{nearest(source.name, near)}")
    return read_recipe(source, list(overrides))


def _unfit(recipe: Recipe, found: Survey, entries: Sequence[Entry]) -> Iterator[Finding]:
    """What a run refuses though every file is right: its resolution, masks that are cut away, words that are."""
    from finetune.data import preparation  # brings torch
    from finetune.data.batches import Batches
    from finetune.data.encode import Latents, Prompts
    from finetune.data.prior import foreseen
    from finetune.families import load_family

    family = load_family(recipe.model)
    try:
        preparation.check_resolution(recipe, family)
    except UserError as error:
        yield Finding("refused", "refused", str(error))
        return
    for entry in entries:
        for problem in preparation.lost_masks([entry], recipe.data.crop, family.latent_scale):
            yield Finding("refused", "refused", problem, (entry.picture.id,))
    if found.problems:
        return
    prompts = None if recipe.adapter.trains_text else Prompts(family, recipe.data)
    try:
        classes = foreseen(recipe, found.concepts)
        batches = Batches(recipe, family, found.concepts, classes, Latents(family, recipe.data), prompts)
        preparation.check_words(batches)
    except UserError as error:
        yield Finding("refused", "refused", str(error))
        return
    for doubt in batches.doubts if recipe.data.strict else ():
        yield Finding("refused", "strict", doubt)


def _copies(pictures: Sequence[Picture], looks: Sequence[Look]) -> Iterator[Finding]:
    def certain(one: int, other: int) -> bool:
        return alike(looks[one], looks[other])

    chains = copies([one.hash for one in looks], certain)
    for group in itertools.chain.from_iterable(around(chain, certain) for chain in chains):
        some = [pictures[index] for index in group]
        same = len({picture.facts.sha256 for picture in some}) == 1
        kind, said = (
            ("copies", "are the same file") if same else ("near copies", "are copies, scaled or compressed anew")
        )
        yield Finding("doubtful", kind, f"{_names(some)} {said}: each counts in training", _ids(some))


def _blurred(pictures: Mapping[str, Picture], sharp: Mapping[str, float]) -> Iterator[Finding]:
    """The most blurred first."""
    for name, value in sorted(sharp.items(), key=lambda one: one[1]):
        if value < BLURRED:
            said = "of one colour" if value == 0 else f"blurred (sharpness {value:.4f}, below {BLURRED})"
            yield Finding("doubtful", "blurred", f"{pictures[name].path.name} is {said}", (name,))


def _seen(pictures: Iterable[Picture], workers: int) -> Iterator[tuple[str, tuple[Look, float]]]:
    """How each picture looks and how sharp it is, by its id."""
    with ThreadPoolExecutor(workers) as pool:
        for picture, seen in ahead(pool, _look, pictures, 8 * workers):
            yield picture.id, seen.result()


def _look(picture: Picture) -> tuple[Look, float]:
    image = decoding.rgb(decoding.decode(decoding.read(picture.path), picture.path))
    return look(image), sharpness(image)


def _sizes(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Pictures that are enlarged, and how much at their largest resolution."""
    scales: dict[Picture, float] = {}
    for entry in entries:
        scale = entry.crop.width / entry.picture.facts.width
        scales[entry.picture] = max(scale, scales.get(entry.picture, 0.0))
    for picture, scale in scales.items():
        if scale > 1:
            size = f"{picture.facts.width} x {picture.facts.height} pixels"
            text = f"{picture.path.name} is {size}, enlarged {scale:.2g} times for training"
            yield Finding("doubtful" if scale > ENLARGED else "note", "small", text, (picture.id,))


def _captions(concept: Concept, data: DataConfig) -> Iterator[Finding]:
    """Captions that are missing, lack the trigger, or say the same; and what the scan itself has noted."""
    pictures, trigger = concept.pictures, concept.config.trigger
    empty = [picture for picture in pictures if not any(picture.captions)]
    if empty:
        if len(empty) == len(pictures):
            yield Finding("note", "no caption", "no picture has a caption: a recipe's prompt must stand for all", ())
        else:
            text = f"{_names(empty)} without a caption, where others have one"
            yield Finding("doubtful", "no caption", text, _ids(empty))
    for note in concept.notes:
        told = "the same picture more than once" in note  # as copies already
        lacks = trigger is not None and f"the trigger {trigger!r}" in note
        if not told:
            yield Finding("doubtful" if lacks else "note", "no trigger" if lacks else "noted", note)
    own = [
        (text, picture) for picture in pictures for text in picture.captions if text and text != concept.config.prompt
    ]
    said: dict[frozenset[str], list[tuple[str, Picture]]] = defaultdict(list)
    for text, picture in own:
        said[frozenset(wording.everything(text, data.wording).lower().replace(",", " ").split())].append(
            (text, picture)
        )
    for group in said.values():
        some = list(dict.fromkeys(picture for _, picture in group))
        if len(some) > 1:
            text = f"{_names(some)} have the same words in their captions: {group[0][0]!r}"
            yield Finding("note", "same captions", text, _ids(some))
    yield from _near(list(said.items())[:MOST_CAPTIONS])


def _near(said: Sequence[tuple[frozenset[str], Sequence[tuple[str, Picture]]]]) -> Iterator[Finding]:
    """Captions of ten words and more of which nine in ten are the same."""
    long = [(words, group) for words, group in said if len(words) >= 10]
    for index, (words, group) in enumerate(long):
        for others, other in long[index + 1 :]:
            if len(words & others) >= 0.9 * max(len(words), len(others)):
                some = [group[0][1], other[0][1]]
                text = f"{_names(some)} have nearly the same caption: {group[0][0]!r}"
                yield Finding("note", "near captions", text, _ids(some))


def _long(recipe: Recipe | None, pictures: Iterable[Picture], data: DataConfig) -> Iterator[Finding]:
    """Captions that are cut: by the tokens of a recipe's model, or else by their words and marks."""
    lost = _by_words if recipe is None else _by_tokens(recipe)
    for picture in pictures:
        for text in picture.captions:
            if (count := lost(wording.everything(text, data.wording))) > 0:
                said = f"{count} {'words' if recipe is None else 'tokens'}"
                text = f"the caption of {picture.path.name} is too long, its last {said} are cut off: {text[:80]!r}"
                yield Finding("doubtful", "long caption", text, (picture.id,))


def _by_words(text: str) -> int:
    return len(text.replace(",", " , ").replace(".", " . ").split()) - LONGEST


def _by_tokens(recipe: Recipe) -> Any:
    from finetune.families import load_family  # brings torch

    family, found = load_family(recipe.model), new_words(recipe.adapter)
    return lambda text: family.caption_overflow(text, found.words if found else {})


def _names(pictures: Sequence[Picture]) -> str:
    names = [picture.path.name for picture in pictures]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _ids(pictures: Sequence[Picture]) -> tuple[str, ...]:
    return tuple(picture.id for picture in pictures)
