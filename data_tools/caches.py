"""What a run makes before its first step, made beforehand: class images and encodings. Processes share the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config import Recipe
from finetune.data import Picture, class_images, scan
from finetune.data.encode import LATENTS, PROMPTS
from finetune.data.packs import PATTERN, unused
from finetune.data.preparation import encode_ahead
from finetune.distributed import start
from finetune.errors import UserError
from finetune.families import load_family

KINDS = LATENTS, PROMPTS


def require_draws(recipe: Recipe) -> None:
    """Refuse a recipe that takes no steps, and so draws no batches.

    Raises:
        UserError: it makes an aesthetic embedding.
    """
    if recipe.adapter.kind == "aesthetic":
        raise UserError("an aesthetic embedding averages whole pictures: nothing is cut, captioned or encoded ahead")


def fill(recipe: Recipe) -> dict[str, Any]:
    """Fill the caches that a run of ``recipe`` reads, and count what is in them; by all processes of a launcher.

    Each phase loads what it needs and frees it: while pictures are encoded there is no denoiser in memory.

    Returns:
        As ``Batches.describe``, with what all processes have read and made; empty on all but the main one.

    Raises:
        UserError: everything that is wrong with the pictures, or nothing of the recipe is cached or drawn.
    """
    require_draws(recipe)
    cache = recipe.data.cache
    if not cache.latents and not cache.text:
        raise UserError("data.cache: latents and text are off, so there is nothing to fill")
    processes = start(recipe.train)
    family = load_family(recipe.model, device=processes.device)
    batches = encode_ahead(recipe, family, processes)
    counts = processes.gather_object(batches.counts)
    totals = {name: sum(each[name] for each in counts) for name in counts[0]}
    return batches.describe() | totals if processes.is_main else {}


def prune(recipe: Recipe, days: float) -> tuple[int, int]:
    """Remove packs of latents and prompts that no run has used for ``days``, whatever recipe they were made for.

    Returns:
        How many, and their bytes.
    """
    count = size = 0
    for kind in KINDS:
        for path in unused(Path(recipe.data.cache.folder) / kind, days):
            size += path.stat().st_size
            path.unlink()
            count += 1
    return count, size


def size(recipe: Recipe, kind: str) -> tuple[int, int]:
    """Packs of ``latents`` or ``prompts`` in the recipe's cache, of all recipes that share it, and their bytes."""
    packs = list((Path(recipe.data.cache.folder) / kind).glob(PATTERN))
    return len(packs), sum(path.stat().st_size for path in packs)


def draw_class_images(recipe: Recipe) -> Sequence[Picture]:
    """The class images of ``recipe``, those drawn that are missing; by all processes of a launcher.

    Returns:
        None of them on any process but the main one.

    Raises:
        UserError: the recipe's prior is not pictures, or a concept has no class prompt.
    """
    if recipe.prior.kind != "images":
        raise UserError(f"prior.kind is {recipe.prior.kind!r}; class images belong to 'images'")
    processes = start(recipe.train)
    family = load_family(recipe.model, device=processes.device)
    pictures = class_images(recipe, family, scan(recipe.data), processes)
    return pictures if processes.is_main else []
