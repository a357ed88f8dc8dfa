"""Named settings for GPUs of some memory: what is in ``profiles.yaml`` fills what a recipe leaves unset."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune.config.document import Located, dump, overlay, parse
from finetune.config.memory import trains_base
from finetune.config.schema import ModelConfig, Recipe, TrainConfig

GIB = 2**30
USABLE = 0.95  # of a GPU's memory; the driver, a screen and fragments have the rest
SECTIONS: Mapping[str, type[ModelConfig | TrainConfig]] = {"model": ModelConfig, "train": TrainConfig}

Settings = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value."""


@functools.cache
def profiles() -> Mapping[str, Mapping[str, Settings]]:
    """Name -> "frozen" or "trained", as the base is -> settings; the smallest GPU first."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found


def laid_under(tree: Located) -> Located:
    """A recipe on top of the profile that it names; the recipe itself where it names none that is known."""
    plain = tree.plain()
    name = plain.get("profile") if isinstance(plain, dict) else None
    if not isinstance(name, str) or name not in profiles():
        return tree
    base, _ = parse(dump(profiles()[name][_way(plain.get("adapter"))]), f"profile {name}", line=0)
    return overlay(base, tree, [])


def filled(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's profile says and no key of the recipe has changed: "train.mixed_precision" -> "bf16"."""
    settings = _settings(recipe, recipe.profile)
    return {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in keys.items()
        if getattr(getattr(recipe, section), key) == getattr(SECTIONS[section].model_validate(keys), key)
    }


def with_profile(recipe: Recipe, name: str | None) -> Recipe:
    """``recipe`` as it would be with another profile, or none."""
    changed = {
        section: getattr(recipe, section).model_copy(update=dict(_changes(recipe, name, section)))
        for section in SECTIONS
    }
    return recipe.model_copy(update={**changed, "profile": name})


def capacity(name: str) -> int:
    """Bytes that a run may take on a GPU of a profile."""
    return usable(int(name.removesuffix("gb")))


def usable(gibibytes: float) -> int:
    """Bytes that a run may take on a GPU of so much memory."""
    return int(gibibytes * GIB * USABLE)


def _changes(recipe: Recipe, name: str | None, section: str) -> Iterator[tuple[str, Any]]:
    before, after = (_settings(recipe, profile).get(section, {}) for profile in (recipe.profile, name))
    kind, own = SECTIONS[section], getattr(recipe, section)
    old, new = kind.model_validate(before), kind.model_validate(after)
    for key in before.keys() | after.keys():
        unset = key not in own.model_fields_set
        if unset or (key in before and getattr(own, key) == getattr(old, key)):
            yield key, getattr(new, key)


def _settings(recipe: Recipe, name: str | None) -> Settings:
    return profiles()[name]["trained" if trains_base(recipe) else "frozen"] if name else {}


def _way(adapter: Any) -> str:
    """As ``trains_base``, of a recipe that has not been checked."""
    parts = [adapter, adapter.get("weights")] if isinstance(adapter, dict) else []
    return "trained" if any(isinstance(part, dict) and part.get("kind") == "full" for part in parts) else "frozen"
