"""Batches of a run, taken and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.batch import Batch
from finetune.config.schema import Recipe
from finetune.data import Batches

Make = Callable[..., Recipe]


Folder = Callable[..., Path]


PRIOR: dict[str, Any] = {"kind": "images", "count": 6, "batch_size": 3, "sampler": {"steps": 1}}


NOT_CACHED: dict[str, Any] = {"cache": {"latents": False, "text": False}}


def steps(batches: Batches, first: int, count: int) -> list[list[Batch]]:
    """The batches of ``count`` optimizer steps, grouped by step."""
    parts = batches.share.accumulation
    taken = list(itertools.islice(batches.from_step(first), count * parts))
    return [taken[parts * step : parts * step + parts] for step in range(count)]


def equal(first: Batch, second: Batch) -> bool:
    """Whether two batches are the same, bit for bit."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return torch.equal(one, other)
        if hasattr(one, "__dataclass_fields__"):
            return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
        return bool(one == other)

    return same(first, second)


def colour(batch: Batch, row: int) -> int:
    """The index that a picture of ``folder`` tells by its red, read from its latent."""
    return round((float(batch.posterior.mean[row, 0].mean()) + 1) * 127.5 / 20)


def family_folder(_: Any, folder: Folder) -> Path:
    """The same pictures again, in another place: content decides, not where it lies."""
    return folder(3, "elsewhere")
