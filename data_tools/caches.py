"""What a run makes before its first step, made beforehand: class images and encodings. Processes share the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.config import Recipe
from finetune.data import Picture, class_images, scan
from finetune.data.preparation import encode_ahead
from finetune.distributed import start
from finetune.errors import UserError
from finetune.families import load_family


def require_draws(recipe: Recipe) -> None:
    """Refuse a recipe that takes no steps, and so draws no batches.

    Raises:
        UserError: it makes an aesthetic embedding.
    """
    if recipe.adapter.kind == "aesthetic":
        raise UserError("an aesthetic embedding averages whole pictures: nothing is cut, captioned or encoded ahead")


def fill(recipe: Recipe) -> dict[str, Any]:
    """Fill the caches that a run of ``recipe`` reads, and count what is in them.

    Each phase loads what it needs and frees it: while pictures are encoded there is no denoiser in memory.

    Raises:
        UserError: everything that is wrong with the pictures, or nothing of the recipe is cached or drawn.
    """
    require_draws(recipe)
    cache = recipe.data.cache
    if not cache.latents and not cache.text:
        raise UserError("data.cache: latents and text are off, so there is nothing to fill")
    processes = start(recipe.train)
    return encode_ahead(recipe, load_family(recipe.model, device=processes.device), processes).describe()


def draw_class_images(recipe: Recipe) -> Sequence[Picture]:
    """The class images of ``recipe``, those drawn that are missing.

    Raises:
        UserError: the recipe's prior is not pictures, or a concept has no class prompt.
    """
    if recipe.prior.kind != "images":
        raise UserError(f"prior.kind is {recipe.prior.kind!r}; class images belong to 'images'")
    processes = start(recipe.train)
    family = load_family(recipe.model, device=processes.device)
    return class_images(recipe, family, scan(recipe.data), processes)
