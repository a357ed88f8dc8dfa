"""A recipe in one line."""

from __future__ import annotations

from finetune.config.schema import Recipe


def summary(recipe: Recipe) -> str:
    """What will be trained on what, for how long, and where it goes."""
    concepts = len(recipe.data.concepts)
    of = f"{concepts} concept{'s' if concepts > 1 else ''}"
    if recipe.adapter.kind == "aesthetic":
        return f"{recipe.recipe} makes {recipe.adapter.summary} for {recipe.model.path}, {of}, into {recipe.output}"
    return ", ".join(
        [
            f"{recipe.recipe} trains {recipe.adapter.summary} of {recipe.model.path}",
            of,
            f"prior {recipe.prior.kind}",
            f"{recipe.train.total_steps} steps of batch {recipe.train.batch_size}"
            + (f" x {n}" if (n := recipe.train.gradient_accumulation_steps) > 1 else ""),
            f"into {recipe.output}",
        ]
    )
