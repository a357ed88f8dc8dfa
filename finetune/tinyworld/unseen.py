"""Captions and scenes that no training set holds."""

from __future__ import annotations

from finetune.tinyworld import captions, world
from finetune.tinyworld.world import Scene

UNSEEN = 4242
"""Seed of the scenes that gates and captions use; the training sets' are others."""


def unseen_captions(count: int, seed: int = UNSEEN) -> list[tuple[str, dict[str, str], Scene]]:
    """Text, the factors it names and the scene it is about."""
    scenes = [Scene.draw(seed, index) for index in range(count)]
    pairs = [captions.caption(s.factors, world.rng("unseen", seed, at)) for at, s in enumerate(scenes)]
    return [(text, named, scene) for (text, named), scene in zip(pairs, scenes, strict=True)]
