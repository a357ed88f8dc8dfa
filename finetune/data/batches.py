"""Pictures to the batches of a run: the endless order, captions, encodings, masks and weights of every draw."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from finetune.batch import Batch, Conditioning, Posterior
from finetune.config.adapters import new_words
from finetune.config.schema import ImagesPrior, ModelPrior, Recipe
from finetune.data import captions, images
from finetune.data.encode import Latents, Prompts
from finetune.data.processes import Alone, Processes
from finetune.data.sampler import Balanced, Drawn, Fixed, Items, Mixed, Order, Pairwise, Plain, Share
from finetune.data.sources import Concept, Picture
from finetune.family import ModelFamily

MASKS = 4096  # that are kept in memory


class Batches:
    """The batches of one process, from any step on.

    Each is a pure function of the recipe, the pictures and its place in the run, so there is no state to save beyond
    the number of the step.

    Args:
        recipe: resolution, dropout, batch size, prior and seed.
        family: for the size of a latent cell.
        concepts: the subjects' pictures.
        classes: pictures of the class; none unless the prior is pictures.
        latents: encoded pictures.
        prompts: encoded captions; None while a text encoder trains, and batches then carry no ``prompt``.
        processes: which share of each step is this process's.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: ModelFamily,
        concepts: Sequence[Concept],
        classes: Sequence[Picture],
        latents: Latents,
        prompts: Prompts | None,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Alone()
        self.recipe, self.family, self.concepts, self.classes = recipe, family, concepts, classes
        self.latents, self.prompts = latents, prompts
        self._subjects = [(picture, concept) for concept in concepts for picture in concept.pictures]
        self.order = order(recipe, concepts, len(classes))
        train = recipe.train
        self.share = Share(train.batch_size, train.gradient_accumulation_steps, processes.rank, processes.world)
        self.masked = any(picture.mask is not None for picture, _ in self._subjects)
        side, scale = recipe.data.resolution, family.latent_scale
        self._mask = lru_cache(MASKS)(lambda picture: images.mask(picture, side, scale))

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first step on, without end."""
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from optimizer step ``step`` on, without end: ``gradient_accumulation_steps`` of them a step."""
        for number in itertools.count(step):
            for part in range(self.share.accumulation):
                yield self.batch(number, part)

    def batch(self, step: int, part: int = 0) -> Batch:
        """The batch of this process in forward pass ``part`` of optimizer step ``step``; subjects first."""
        drawn = [one for number in self.share.draws(step, part) for one in self.order.at(number)]
        return self._assemble(sorted(drawn, key=lambda one: one.prior))

    def _assemble(self, drawn: Sequence[Drawn]) -> Batch:
        pictures = [self._picture(one) for one in drawn]
        texts = [self._caption(picture, one) for picture, one in zip(pictures, drawn, strict=True)]
        flips = [self._flipped(picture, one) for picture, one in zip(pictures, drawn, strict=True)]
        posteriors = [self.latents.get(picture, flip) for picture, flip in zip(pictures, flips, strict=True)]
        side = self.recipe.data.resolution
        class_captions = self._class_captions(drawn)
        return Batch(
            ids=tuple(picture.id for picture in pictures),
            draws=tuple(one.number for one in drawn),
            captions=tuple(texts),
            posterior=Posterior(
                mean=torch.cat([posterior.mean for posterior in posteriors]),
                logvar=torch.cat([posterior.logvar for posterior in posteriors]),
            ),
            prior=torch.tensor([one.prior for one in drawn]),
            weight=torch.tensor([picture.weight for picture in pictures], dtype=torch.float32),
            geometry=torch.stack([images.geometry(p, side, flip) for p, flip in zip(pictures, flips, strict=True)]),
            mask=self._masks(pictures, flips) if self.masked else None,
            prompt=self._encoded(texts),
            class_captions=class_captions,
            class_prompt=self._encoded(class_captions) if class_captions else None,
        )

    def _picture(self, one: Drawn) -> Picture:
        return self.classes[one.item] if one.prior else self._subjects[one.item][0]

    def _caption(self, picture: Picture, one: Drawn) -> str:
        """Class images are never drawn without their caption: it is the class prompt that is to be preserved."""
        dropout = 0.0 if one.prior else self.recipe.data.caption_dropout
        return captions.draw(picture.captions, self.recipe.seed, picture.id, one.number, dropout)

    def _flipped(self, picture: Picture, one: Drawn) -> bool:
        return self.recipe.data.flip and captions.chance(self.recipe.seed, "flip", picture.id, one.number) < 0.5

    def _class_captions(self, drawn: Sequence[Drawn]) -> tuple[str, ...] | None:
        if not isinstance(self.recipe.prior, ModelPrior):
            return None
        return tuple(self._subjects[one.item][1].config.class_prompt or "" for one in drawn)

    def _masks(self, pictures: Sequence[Picture], flips: Sequence[bool]) -> Tensor:
        least = self.recipe.data.unmasked_weight
        masks = [self._mask(picture).clamp(min=least) for picture in pictures]
        return torch.stack([mask.flip(-1) if flip else mask for mask, flip in zip(masks, flips, strict=True)])

    def _encoded(self, texts: Sequence[str]) -> Conditioning | None:
        return None if self.prompts is None else self.prompts.stack(texts)

    @property
    def pictures(self) -> list[Picture]:
        """Of the subjects, then of the class."""
        return [picture for picture, _ in self._subjects] + list(self.classes)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every picture file, by id."""
        return {picture.id: picture.facts.sha256 for picture in self.pictures}

    @property
    def words(self) -> dict[str, int]:
        """The new words that are learned, and how many tokens each is."""
        found = new_words(self.recipe.adapter)
        return found.words if found else {}

    @cached_property
    def final_captions(self) -> list[str]:
        """Every string that some batch's prompts can hold, each once."""
        texts = [text for picture in self.pictures for text in picture.captions]
        if isinstance(self.recipe.prior, ModelPrior):
            texts += [concept.config.class_prompt or "" for concept in self.concepts]
        return list(dict.fromkeys([*texts, *([""] if self.recipe.data.caption_dropout else [])]))

    @property
    def example_prompts(self) -> list[str]:
        """What previews draw where a recipe names nothing: each concept's prompt and its class prompt."""
        own = [concept.config.prompt or concept.pictures[0].captions[0] for concept in self.concepts]
        classes = [concept.config.class_prompt for concept in self.concepts if concept.config.class_prompt]
        return list(dict.fromkeys(own + classes))

    @cached_property
    def notes(self) -> list[str]:
        """What a person should know of the pictures and captions, a sentence each."""
        notes = [note for concept in self.concepts for note in concept.notes]
        if small := self._enlarged():
            side = self.recipe.data.resolution
            notes.append(f"{small} of {len(self.pictures)} pictures are smaller than {side} pixels and are enlarged")
        if self.recipe.adapter.kind == "embedding" and self.recipe.prior.kind != "none":
            notes.append("the prior changes nothing: no class caption holds a new word, and nothing else trains")
        if cut := self._cut:
            text, lost = max(cut.items(), key=lambda item: item[1])
            notes.append(
                f"{len(cut)} of {len(self.final_captions)} captions are too long: {text!r} loses {lost} tokens"
            )
        return notes

    @cached_property
    def _cut(self) -> dict[str, int]:
        """Captions that the text encoder cannot read whole, and how many tokens they lose."""
        lost = {text: self.family.caption_overflow(text, self.words) for text in self.final_captions}
        return {text: count for text, count in lost.items() if count}

    def _enlarged(self) -> int:
        side = self.recipe.data.resolution
        return sum(min(picture.facts.width, picture.facts.height) < side for picture in self.pictures)

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report, as plain numbers and strings."""
        stores: list[tuple[str, Latents | Prompts]] = [("latents", self.latents)]
        stores += [("prompts", self.prompts)] if self.prompts else []
        return {
            "concepts": len(self.concepts),
            "pictures": len(self._subjects),
            "draws_per_epoch": draws_per_epoch(self.recipe, self.concepts),
            "draws_per_step": self.share.per_step,
            "class_images": len(self.classes),
            "masked": sum(picture.mask is not None for picture, _ in self._subjects),
            "captions": len(self.final_captions),
            "captions_cut": len(self._cut),
            **{f"{name}_{what}": number for name, store in stores for what, number in vars(store.counts).items()},
            "notes": self.notes,
        }


def order(recipe: Recipe, concepts: Sequence[Concept], classes: int) -> Order:
    """The order that a recipe's prior asks for.

    Args:
        classes: number of class pictures.
    """
    items = _items(recipe, concepts)
    if not isinstance(recipe.prior, ImagesPrior):
        return Plain(items, recipe.seed)
    kind = Pairwise if recipe.prior.layout == "pairwise" else Mixed
    return kind(items, classes, recipe.seed)


def draws_per_epoch(recipe: Recipe, concepts: Sequence[Concept]) -> int:
    """Subject pictures of an epoch."""
    return len(_items(recipe, concepts))


def _items(recipe: Recipe, concepts: Sequence[Concept]) -> Items:
    """The subjects' pictures: balanced, or each as often as its concept repeats."""
    ends = list(itertools.accumulate(len(concept.pictures) for concept in concepts))
    groups = [range(end - len(concept.pictures), end) for end, concept in zip(ends, concepts, strict=True)]
    if recipe.data.balance:
        return Balanced(groups, recipe.seed)
    repeated = zip(groups, concepts, strict=True)
    return Fixed([item for group, concept in repeated for item in list(group) * concept.config.repeats])
