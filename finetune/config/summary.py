"""A recipe in one line."""

from __future__ import annotations

from finetune.config.schema import LoraConfig, Recipe


def summary(recipe: Recipe) -> str:
    """What will be trained on what, for how long, and where it goes."""
    concepts = len(recipe.data.concepts)
    return ", ".join(
        [
            f"{recipe.recipe} trains {trained(recipe)} of {recipe.model.path}",
            f"{concepts} concept{'s' if concepts > 1 else ''}",
            f"prior {recipe.prior.kind}",
            f"{recipe.train.steps} steps of batch {recipe.train.batch_size}"
            + (f" x {n}" if (n := recipe.train.gradient_accumulation_steps) > 1 else ""),
            f"into {recipe.output}",
        ]
    )


def trained(recipe: Recipe) -> str:
    """What the adapter changes: "lora of rank 16 on attention"."""
    adapter = recipe.adapter
    of = adapter.targets if isinstance(adapter, LoraConfig) else adapter.select
    where = of if isinstance(of, str) else f"{len(of)} pattern{'s' if len(of) > 1 else ''}"
    text = " and the text encoder" if adapter.text_encoder else ""
    return (f"lora of rank {adapter.rank} on " if isinstance(adapter, LoraConfig) else "weights: ") + where + text
