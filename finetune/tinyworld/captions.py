"""The caption language: a scene to words and back.

    [a photo of | a picture of] a|an|the [SIZE] [FILL] [COLOUR] [RARE] SHAPE [PLACE] [PLACE]

where the places are the background and the position in either order. Every factor but the shape may stay unsaid, so
that "a star" covers every star of the world.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from finetune.errors import UserError
from finetune.tinyworld.world import FACTORS

RARE = (
    *("zib", "wug", "dax", "fep", "blick", "toma", "gazzer", "kiki"),
    *("modi", "lorp", "vash", "quib", "snerf", "plim", "yorg", "hux"),
)
"""Words without a meaning: one stands before the class word in 1 of 200 captions of the base's training."""

OPENINGS = ("", "a photo of ", "a picture of ")
CLASSES = FACTORS["shape"]
ANY = "shape"  # a class word that names no class
ADJECTIVES = ("size", "fill", "colour")
PLACES = ("background", "position")
SPOKEN = {"size": 0.4, "fill": 0.55, "colour": 0.65, "background": 0.6, "position": 0.55}
BARE = 0.04  # captions that name the class alone
FUNCTION_WORDS = ("a", "an", "the", "photo", "picture", "of", "in", "on", "at", "style")


def words() -> list[str]:
    """Every word of the language, in a fixed order."""
    named = [word for values in FACTORS.values() for value in values for word in value.split()]
    return list(dict.fromkeys([*FUNCTION_WORDS, *named, ANY, *RARE]))


def compose(named: Mapping[str, str], *, token: str = "", opening: str = "", places: tuple[str, ...] = PLACES) -> str:
    """The caption that names exactly ``named``.

    Args:
        named: some of the factors; without ``shape`` the class word is "shape".
        token: a word to put before the class word.
        opening: one of ``OPENINGS``.
        places: the order of background and position.
    """
    adjectives = [named[name] for name in ADJECTIVES if name in named]
    noun = [*adjectives, *([token] if token else []), named.get("shape", ANY)]
    article = "an" if noun[0][0] in "aeio" else "a"
    return opening + " ".join([article, *noun, *(named[name] for name in places if name in named)])


def caption(factors: Mapping[str, str], generator: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A caption of a scene that names a random part of its factors, and what it names."""
    bare = generator.random() < BARE
    named = {name: factors[name] for name, chance in SPOKEN.items() if generator.random() < chance and not bare}
    if generator.random() >= 0.02:
        named["shape"] = factors["shape"]
    opening = OPENINGS[int(generator.choice(3, p=(0.7, 0.2, 0.1)))]
    places = PLACES if generator.random() < 0.5 else PLACES[::-1]
    rare, manner = generator.random(), generator.random()
    token = RARE[int(generator.integers(len(RARE)))]
    text = compose(named, token=token if rare < 0.005 else "", opening=opening, places=places)
    if manner < 0.005:
        text += f" in the style of {token}"
    return text, {name: named[name] for name in FACTORS if name in named}


def parse(text: str) -> dict[str, str]:
    """The factors that a caption names; words that name none are passed over.

    Raises:
        UserError: when two values of one factor are named.
    """
    padded = f" {' '.join(text.lower().split())} "
    found: dict[str, str] = {}
    for name, values in FACTORS.items():
        hits = [value for value in values if f" {value} " in padded]
        if len(hits) > 1:
            raise UserError(f"caption {text!r} names two values of {name}: {hits[0]} and {hits[1]}; expected one")
        if hits:
            found[name] = hits[0]
    return found
