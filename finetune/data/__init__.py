"""Files in, batches out. Importing this package loads no torch; ``prepare`` does.

concepts = scan(recipe.data)                          every picture found, decoded and checked; no torch
classes = class_images(recipe, family, concepts, processes)   prior pictures, drawn once by the untouched model
batches = prepare(recipe, family, processes)          all of it, encoded and cached; before an adapter is attached
for batch in batches.from_step(k): ...                ``finetune.batch.Batch``, without end
batches.describe()                                    counts for the log and the report
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.data.sources import Concept, Picture, resolve, scan

if TYPE_CHECKING:
    from finetune.data.batches import Batches
    from finetune.data.preparation import prepare
    from finetune.data.prior import class_images

__all__ = ["Batches", "Concept", "Picture", "class_images", "prepare", "resolve", "scan"]


def __getattr__(name: str) -> Any:
    """The parts that need torch, loaded on first use."""
    import importlib

    homes = {"Batches": "batches", "prepare": "preparation", "class_images": "prior"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
