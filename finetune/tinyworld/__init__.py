"""The embedded world: captioned pictures, a small base model that learned them, and a judge that reads them.

Importing this package loads no torch; ``Judge`` is loaded on first use.

    BASE                       the shipped StableDiffusionPipeline folder
    base(name)                 the folder of a shipped model: of "tinyworld", BASE; of "tinyworld-flow", one that is put
                               together in the user's cache
    pipeline(name)             its diffusers pipeline, float32 on the CPU
    FACTORS                    what captions can name: shape, colour, fill, background, position, size -> values
    Scene.draw(seed, index)    a random scene; Scene.having(factors, rng(...)) one with given factors
    render(scene)              picture (RGB) and mask (L, 255 = object), 64 x 64
    caption(factors, rng(...)) a caption that names a random part of the factors, and what it names
    compose(named, token=...)  the caption that names exactly these factors
    parse(text)                the factors that a caption names
    subject(seed)              a never-seen individual: .shape .token .instance_prompt .class_prompt .render(scene)
    instance_pictures(one)     its 5 training pictures;  heldout_pictures(one) others, in other places
    scene_prompts(one, token)  [(prompt, factors)]: the subject in new places; token "" leaves the token out
    style(seed)                a style: .apply(picture) .token .prompt(scene)
    training_scenes(seed)      the scenes of a style's training pictures
    Judge.load()               .attributes(images) -> {factor: indices (B,)}, .attribute_names(images),
                               .embed(images) -> unit vectors (B, 64), .prompt_accuracy(images, factors) -> (B,);
                               images are PIL pictures or float (B, 3, 64, 64) in [0, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, nearest
from finetune.tinyworld.captions import RARE, caption, compose, parse
from finetune.tinyworld.style import Style, style, training_scenes
from finetune.tinyworld.subject import (
    Subject,
    heldout_pictures,
    instance_pictures,
    instance_scenes,
    new_scenes,
    scene_prompts,
    subject,
)
from finetune.tinyworld.world import FACTORS, Scene, render, rng

if TYPE_CHECKING:
    from finetune.tinyworld.judge import Judge

BASE = Path(__file__).parent / "base"
FLOW = Path(__file__).parent / "base-flow"
"""Of the flow-matching model, what the other does not have."""

NAMES = ("tinyworld", "tinyworld-flow")
"""What ``model.path`` calls the shipped models."""

__all__ = [
    "BASE",
    "FACTORS",
    "FLOW",
    "NAMES",
    "RARE",
    "Judge",
    "Scene",
    "Style",
    "Subject",
    "base",
    "caption",
    "compose",
    "heldout_pictures",
    "instance_pictures",
    "instance_scenes",
    "new_scenes",
    "parse",
    "pipeline",
    "render",
    "rng",
    "scene_prompts",
    "style",
    "subject",
    "training_scenes",
]


def base(name: str) -> Path:
    """The diffusers folder of a shipped model, one of ``NAMES``.

    Raises:
        UserError: there is no such model.
    """
    if name not in NAMES:
        raise UserError(f"{name!r} is no model that is shipped{nearest(name, NAMES)}")
    if name == "tinyworld":
        return BASE
    from finetune.tinyworld import flow_base

    return flow_base.folder()


def pipeline(name: str) -> Any:
    """The diffusers pipeline of a shipped model, one of ``NAMES``, float32 on the CPU."""
    from finetune.tinyworld.training.export import load

    return load(base(name))


def __getattr__(name: str) -> Any:
    if name == "Judge":
        from finetune.tinyworld.judge import Judge

        return Judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
