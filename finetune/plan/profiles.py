"""Which profiles a recipe would fit, each estimated as the recipe is."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.adapters import attach
from finetune.config import Recipe
from finetune.config.checks import contradictions
from finetune.config.profiles import capacity, profiles, with_profile
from finetune.families import load_family, model_folder
from finetune.plan.contents import Fit, Memory
from finetune.plan.memory import estimate
from finetune.plan.skeleton import fill


def fits(recipe: Recipe, own: Memory, longest: str) -> Iterator[Fit]:
    """What ``recipe`` would need with every profile that goes with it, the smallest GPU first.

    Args:
        own: of the recipe as it is.
        longest: as in ``finetune.plan.memory.estimate``.
    """
    for name in profiles():
        other = with_profile(recipe, name)
        if next(contradictions(other), None) is not None:
            continue
        found = own
        if name != recipe.profile:
            family = load_family(other.model, other.objective)
            fill(family, model_folder(other.model))
            found = estimate(other, family, attach(other.adapter, family, other.seed), longest)
        yield Fit(profile=name, bytes=found.most, room=capacity(name))
