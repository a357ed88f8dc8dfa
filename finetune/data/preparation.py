"""From a recipe to its batches, with no more networks in memory at a time than a phase needs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

from finetune.config import tools
from finetune.config.adapters import new_words
from finetune.config.checks import FORMATS
from finetune.config.crop import CropConfig
from finetune.config.schema import Recipe
from finetune.data import images, prior, sources
from finetune.data.batches import Batches
from finetune.data.cache import remove_stale
from finetune.data.encode import Latents, Prompts
from finetune.data.entries import Entry, subject_entries, variants
from finetune.data.processes import Alone, Processes
from finetune.errors import UserError
from finetune.family import ModelFamily, writable

log = logging.getLogger(__name__)


def prepare(recipe: Recipe, family: ModelFamily, processes: Processes | None = None) -> Batches:
    """Make everything that a run reads; call it before an adapter is attached.

    What can be encoded ahead is (``encode_ahead``), and then the denoiser is loaded, with a text encoder that trains
    and any encoder whose results the recipe asks not to keep.

    Args and errors as of ``encode_ahead``.
    """
    batches = encode_ahead(recipe, family, processes)
    trains = recipe.adapter.trains_text
    cache, texts = recipe.data.cache, family.text_encoders
    family.require("denoiser", *(texts if trains or not cache.text else ()), *(() if cache.latents else ("vae",)))
    return batches


def encode_ahead(recipe: Recipe, family: ModelFamily, processes: Processes | None = None) -> Batches:
    """Fill the caches of a run, with no more in memory than a phase needs.

    Pictures are checked, class images drawn, captions encoded and the text encoders freed, pictures encoded and the
    image encoder freed.

    Args:
        recipe: decides all of it.
        family: its networks are loaded and freed here.
        processes: of the run; class images and encodings are shared out among them.

    Raises:
        UserError: everything that is wrong with the pictures, or doubtful of them with ``data.strict``, or a recipe
            that does not fit the model.
        GuardError: something trains already, or an encoder gives numbers that are not finite.
    """
    processes = processes or Alone()
    check_fit(recipe, family)
    concepts = sources.scan(recipe.data, words=new_words(recipe.adapter))
    entries = itertools.chain.from_iterable(subject_entries(recipe.data, concepts))
    sources.refuse(lost_masks(entries, recipe.data.crop, family.latent_scale))
    if recipe.prior.kind != "none":
        prior.class_prompts(concepts)
    if processes.rank == 0:
        remove_stale(Path(recipe.data.cache.folder))
    processes.barrier()
    parts = (Latents(family, recipe.data), None if recipe.adapter.trains_text else Prompts(family, recipe.data))
    if recipe.data.strict:  # before class images are drawn, which takes long
        foreseen = Batches(recipe, family, concepts, prior.foreseen(recipe, concepts), *parts, processes)
        sources.refuse_doubts(recipe.data, foreseen.doubts)
    classes = prior.class_images(recipe, family, concepts, processes)
    batches = Batches(recipe, family, concepts, classes, *parts, processes)
    check_words(batches)
    _encode(batches, recipe, family, processes)
    if processes.rank == 0:
        for note in batches.notes:
            log.warning("%s", note)
    return batches


def _encode(batches: Batches, recipe: Recipe, family: ModelFamily, processes: Processes) -> None:
    cache = recipe.data.cache
    if batches.prompts and cache.text:
        batches.prompts.fill(batches.final_captions, processes)
        family.release(*family.text_encoders)
    if cache.latents:
        both = (False, True) if recipe.data.flip else (False,)
        batches.latents.fill(((one.picture, one.crop, flip) for one in batches.entries for flip in both), processes)
        family.release("vae")


def check_words(batches: Batches) -> None:
    """Refuse captions that are so long that a new word in them would be cut off."""
    for word in batches.words:
        for text in (text for text in batches.final_captions if word in text):
            until = text[: text.rindex(word) + len(word)]
            if lost := batches.family.caption_overflow(until, batches.words):
                raise UserError(
                    f"{word!r} stands too far back in the caption {text!r}: the last {lost} tokens up to it would be "
                    "cut off; shorten what is before it, or lower vectors"
                )


def lost_masks(entries: Iterable[Entry], crop: CropConfig, scale: int) -> list[str]:
    """What is wrong with masks once pictures are cut, wherever a draw may cut them: nothing may be left of them."""
    problems = []
    for entry in (entry for entry in entries if entry.picture.mask is not None):
        try:
            for cut in dict.fromkeys(variants(entry, crop)):
                images.mask(cut.picture, cut.crop, scale)
        except UserError as error:
            problems.append(str(error))
    return problems


def check_fit(recipe: Recipe, family: ModelFamily) -> None:
    """Refuse what a recipe asks for and its model's family has not.

    Raises:
        UserError: a resolution does not divide into the denoiser's cells, or there are no files of a layout.
    """
    check_resolution(recipe, family)
    asked = recipe.export.formats or ()
    if lacking := [layout for layout in asked if layout not in writable(asked, family.export_names)]:
        there = ", ".join(writable(FORMATS[recipe.adapter.kind], family.export_names))
        raise UserError(f"export.formats: {family.name} has no files of layout {lacking[0]!r}; it has {there}")
    _check_tools(recipe, family)


def _check_tools(recipe: Recipe, family: ModelFamily) -> None:
    """Refuse tools that cannot run models of the family, or for which there are no files of it."""
    names = family.export_names
    for method in tools.methods(recipe.adapter):
        for tool in recipe.export.tools or ():
            layout = tools.READS[method][tool]
            if layout in ("diffusers", "peft", "delta"):
                continue
            there = writable((layout,), names)
            if not there or tool in names["denoiser"].unread_by:
                why = "cannot read files of" if there else f"reads layout {layout!r}, which there is not of"
                able = [one for one, read in tools.READS[method].items() if read in ("diffusers", "peft", "delta")]
                raise UserError(f"export.for: {tool} {why} {family.name} models; {able[0]} reads those that there are")


def check_resolution(recipe: Recipe, family: ModelFamily) -> None:
    """Refuse a resolution that does not divide into the denoiser's cells."""
    data, multiple = recipe.data, family.pixel_multiple
    # class images and previews are squares, and all sides of buckets are multiples of their step
    others = {"buckets.step": [data.buckets.step]} if data.buckets else {"more_resolutions": data.more_resolutions}
    sides = {"resolution": [data.resolution], **others}
    for name, side in ((name, side) for name, found in sides.items() for side in found if side % multiple):
        below = side // multiple * multiple
        choices = " or ".join(str(number) for number in (below, below + multiple) if number)
        raise UserError(
            f"data.{name} is {side}; {family.name} at {family.source} needs a multiple of {multiple}: {choices}"
        )
