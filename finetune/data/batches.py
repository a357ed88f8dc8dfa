"""Pictures to the batches of a run: the endless order, captions, encodings, masks and weights of every draw."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.batch import Batch, Conditioning, Posterior
from finetune.config.adapters import new_words
from finetune.config.schema import ModelPrior, Recipe
from finetune.data import captions, images, wording
from finetune.data.encode import LATENTS, PROMPTS, Latents, Prompts
from finetune.data.entries import (
    ENLARGED,
    Entry,
    at_draw,
    class_entries,
    draws_per_epoch,
    order,
    subject_entries,
    variants,
)
from finetune.data.processes import Alone, Processes
from finetune.data.sampler import Drawn, Share
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
        train = recipe.train
        self.share = Share(train.batch_size, train.gradient_accumulation_steps, processes.rank, processes.world)
        by_concept, self._classes = subject_entries(recipe.data, concepts), class_entries(recipe.data, classes)
        self.order = order(recipe, concepts, by_concept, self._classes, self.share.per_step)
        self._subjects = list(itertools.chain.from_iterable(by_concept))
        self.masked = any(entry.picture.mask is not None for entry in self._subjects)
        self._mask = lru_cache(MASKS)(lambda entry: images.mask(entry.picture, entry.crop, family.latent_scale))

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
        entries = [self.entry(one) for one in drawn]
        pictures = [entry.picture for entry in entries]
        texts = [self.caption(one) for one in drawn]
        flips = [self.flipped(one) for one in drawn]
        mirrored = list(zip(entries, flips, strict=True))
        posteriors = [self.latents.get(entry.picture, entry.crop, flip) for entry, flip in mirrored]
        sizes = [(posterior.mean.shape[-2], posterior.mean.shape[-1]) for posterior in posteriors]
        class_captions = self._class_captions(drawn)
        return Batch(
            ids=tuple(picture.id for picture in pictures),
            draws=tuple(one.number for one in drawn),
            captions=tuple(texts),
            posterior=Posterior(
                mean=_padded([posterior.mean for posterior in posteriors]),
                logvar=_padded([posterior.logvar for posterior in posteriors]),
            ),
            prior=torch.tensor([one.prior for one in drawn]),
            weight=torch.tensor([picture.weight for picture in pictures], dtype=torch.float32),
            timestep_bias=self._biases(pictures),
            geometry=torch.stack([images.geometry(entry.picture, entry.crop, flip) for entry, flip in mirrored]),
            mask=self._masks(drawn, mirrored) if self.masked else None,
            prompt=self._encoded(texts),
            class_captions=class_captions,
            class_prompt=self._encoded(class_captions) if class_captions else None,
            sizes=tuple(sizes) if len(set(sizes)) > 1 else None,
        )

    def entry(self, one: Drawn) -> Entry:
        """The picture of a draw, and where that draw cuts it."""
        entry = (self._classes if one.prior else self._subjects)[one.item]
        return at_draw(entry, self.recipe.data.crop, self.recipe.seed, one.number)

    def caption(self, one: Drawn) -> str:
        """What a draw reads, worded or dropped.

        Class images are never drawn without their caption: it is the class prompt that is to be preserved.
        """
        data, picture = self.recipe.data, self.entry(one).picture
        own = (picture.captions, self.recipe.seed, picture.id, one.number)
        if one.prior:
            return captions.draw(*own)
        if data.caption_dropout_every_n_epochs and (one.epoch + 1) % data.caption_dropout_every_n_epochs == 0:
            return ""
        return captions.draw(*own, data.caption_dropout, data.wording, one.number // self.share.per_step)

    def flipped(self, one: Drawn) -> bool:
        """Whether a draw is mirrored."""
        name = self.entry(one).picture.id
        return self.recipe.data.flip and captions.chance(self.recipe.seed, "flip", name, one.number) < 0.5

    def _biases(self, pictures: Sequence[Picture]) -> Tensor | None:
        run = self.recipe.objective.timesteps.bias
        if not run and all(concept.config.timestep_bias is None for concept in self.concepts):
            return None
        own = [run if picture.timestep_bias is None else picture.timestep_bias for picture in pictures]
        return torch.tensor(own, dtype=torch.float32)

    def unmasked_weight(self, one: Drawn) -> float:
        """How much places outside its mask count in a draw; 1 where it leaves the mask out."""
        data, name = self.recipe.data, self.entry(one).picture.id
        dropped = captions.chance(self.recipe.seed, "unmasked", name, one.number) < data.unmasked_probability
        return 1.0 if dropped else data.unmasked_weight

    def _class_captions(self, drawn: Sequence[Drawn]) -> tuple[str, ...] | None:
        if not isinstance(self.recipe.prior, ModelPrior):
            return None
        return tuple(self._subjects[one.item].class_prompt or "" for one in drawn)

    def _masks(self, drawn: Sequence[Drawn], mirrored: Sequence[tuple[Entry, bool]]) -> Tensor:
        least = [self.unmasked_weight(one) for one in drawn]
        masks = [
            (self._mask(entry).clamp(min=weight), flip) for (entry, flip), weight in zip(mirrored, least, strict=True)
        ]
        return _padded([(mask.flip(-1) if flip else mask)[None] for mask, flip in masks])

    def _encoded(self, texts: Sequence[str]) -> Conditioning | None:
        return None if self.prompts is None else self.prompts.stack(texts)

    @property
    def pictures(self) -> list[Picture]:
        """Of the subjects, then of the class."""
        return [picture for concept in self.concepts for picture in concept.pictures] + list(self.classes)

    @property
    def subjects(self) -> Sequence[Entry]:
        """All that can be drawn of the subjects."""
        return self._subjects

    @property
    def entries(self) -> list[Entry]:
        """All that can be drawn: of the subjects, then of the class."""
        crop = self.recipe.data.crop
        return [cut for entry in (*self._subjects, *self._classes) for cut in variants(entry, crop)]

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
        """Every string that some batch's prompts can hold, each once.

        Where wording makes a caption another one in each draw, these are the strings of the run's own draws, all of
        them if they are encoded ahead and the first ``wording.MOST`` otherwise.

        Raises:
            UserError: they are too many to be encoded ahead.
        """
        ahead = self.prompts is not None and self.recipe.data.cache.text
        texts = wording.distinct(self._varied(), ahead) if self._varies else self._unvaried()
        texts += [text for picture in self.classes for text in picture.captions]
        if isinstance(self.recipe.prior, ModelPrior):
            texts += [concept.config.class_prompt or "" for concept in self.concepts]
        data = self.recipe.data
        drops = data.caption_dropout or data.caption_dropout_every_n_epochs
        return list(dict.fromkeys([*texts, *([""] if drops else [])]))

    @property
    def _varies(self) -> bool:
        return self.recipe.data.wording is not None and self.recipe.data.wording.varies

    def _varied(self) -> Iterator[str]:
        """Captions of the subjects in all draws of the run."""
        for number in range(self.recipe.train.total_steps * self.share.per_step):
            drawn = (one for one in self.order.at(number) if not one.prior)
            yield from map(self.caption, drawn)

    def _unvaried(self) -> list[str]:
        """Captions of the subjects' pictures, which are the same in every draw."""
        pictures = [picture for concept in self.concepts for picture in concept.pictures]
        return [wording.plain(text, self.recipe.data.wording) for picture in pictures for text in picture.captions]

    @property
    def example_prompts(self) -> list[str]:
        """What previews draw where a recipe names nothing: each concept's prompt and its class prompt."""
        worded = self.recipe.data.wording
        own = [c.config.prompt or wording.plain(c.pictures[0].captions[0], worded) for c in self.concepts]
        classes = [concept.config.class_prompt for concept in self.concepts if concept.config.class_prompt]
        return list(dict.fromkeys(own + classes))

    @cached_property
    def notes(self) -> list[str]:
        """What a person should know of the pictures and captions, a sentence each."""
        notes = list(self.doubts)
        if small := sum(scale > 1 for scale in self._scales):
            least = "their shape" if self.recipe.data.buckets else f"{self.recipe.data.resolution} pixels"
            notes.append(f"{small} of {len(self.pictures)} pictures are smaller than {least} and are enlarged")
        return notes

    @cached_property
    def doubts(self) -> list[str]:
        """Those of ``notes`` that are probably mistakes, and that ``data.strict`` refuses."""
        doubts = [note for concept in self.concepts for note in concept.notes]
        if large := sum(scale > ENLARGED for scale in self._scales):
            doubts.append(f"{large} of {len(self.pictures)} pictures are enlarged more than {ENLARGED} times")
        own = (text for concept in self.concepts for picture in concept.pictures for text in picture.captions)
        if unknown := wording.unmatched(own, self.recipe.data.wording):
            doubts.append(f"tag_dropout: no tag of a caption is {' or '.join(map(repr, unknown))}")
        if self.recipe.adapter.kind == "embedding" and self.recipe.prior.kind != "none":
            doubts.append("the prior changes nothing: no class caption holds a new word, and nothing else trains")
        if cut := self._cut:
            text, lost = max(cut.items(), key=lambda item: item[1])
            doubts.append(
                f"{len(cut)} of {len(self.final_captions)} captions are too long: {text!r} loses {lost} tokens"
            )
        return doubts

    @cached_property
    def _cut(self) -> dict[str, int]:
        """Captions that the text encoder cannot read whole, and how many tokens they lose."""
        lost = {text: self.family.caption_overflow(text, self.words) for text in self.final_captions}
        return {text: count for text, count in lost.items() if count}

    @property
    def _scales(self) -> Iterable[float]:
        """How much each picture is enlarged at the first resolution."""
        entries = reversed((*self._subjects, *self._classes))
        crops = {entry.picture.id: entry.crop.width / entry.picture.facts.width for entry in entries}
        return crops.values()

    @property
    def counts(self) -> dict[str, int]:
        """What this process has read and made of latents and prompts: ``latents_made``, ``prompts_damaged`` ..."""
        stores: list[tuple[str, Latents | Prompts]] = [(LATENTS, self.latents)]
        stores += [(PROMPTS, self.prompts)] if self.prompts else []
        return {f"{name}_{what}": number for name, store in stores for what, number in vars(store.counts).items()}

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report, as plain numbers and strings."""
        return {
            "concepts": len(self.concepts),
            "pictures": sum(len(concept.pictures) for concept in self.concepts),
            "draws_per_epoch": draws_per_epoch(self.recipe, self.concepts),
            "draws_per_step": self.share.per_step,
            "class_images": len(self.classes),
            "masked": sum(picture.mask is not None for picture in self.pictures),
            "captions": len(self.final_captions),
            "captions_cut": len(self._cut),
            **self.counts,
            "notes": self.notes,
        }


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [1, C, h, w] as one [B, C, H, W]; zeros to the right of and below the smaller ones."""
    if len({part.shape for part in parts}) == 1:
        return torch.cat(list(parts))
    high, wide = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return torch.cat([F.pad(part, (0, wide - part.shape[-1], 0, high - part.shape[-2])) for part in parts])
