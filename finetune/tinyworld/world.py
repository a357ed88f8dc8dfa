"""The procedural world: a scene is one object on one background, and a picture of it is a pure function of the scene.

Six factors describe a scene in words (``FACTORS``). Beside them a scene holds what no caption can say: where exactly
the object stands, how large it exactly is and how bright the background is. ``Scene.draw(seed, index)`` is a pure
function, so a training set is two integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.tinyworld import draw

Colour = tuple[int, int, int]

COLOURS: dict[str, tuple[Colour, Colour]] = {  # the tone that the name means, and the second tone of its patterns
    "red": ((222, 28, 36), (255, 184, 176)),
    "orange": ((250, 132, 8), (140, 62, 0)),
    "yellow": ((255, 226, 22), (166, 116, 0)),
    "green": ((10, 150, 52), (176, 240, 168)),
    "cyan": ((16, 214, 226), (0, 98, 122)),
    "blue": ((30, 68, 226), (164, 200, 255)),
    "purple": ((132, 32, 178), (226, 180, 248)),
    "pink": ((255, 112, 190), (158, 18, 98)),
}

BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {  # top and bottom of a smooth gradient
    "on grass": ((176, 196, 138), (92, 128, 70)),
    "on sand": ((236, 220, 184), (196, 168, 120)),
    "on snow": ((222, 232, 244), (250, 252, 255)),
    "at night": ((16, 18, 42), (52, 52, 88)),
    "in the sea": ((116, 160, 184), (40, 84, 124)),
    "at sunset": ((128, 98, 134), (236, 172, 140)),
}

POSITIONS: dict[str, tuple[int, int]] = {
    "at the left": (-1, 0),
    "at the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the centre": (0, 0),
}

SIZES: dict[str, tuple[float, float]] = {"small": (28.0, 15.5), "large": (40.0, 10.5)}  # diameter, way from the middle

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": tuple(draw.SHAPES),
    "colour": tuple(COLOURS),
    "fill": tuple(draw.FILLS),
    "background": tuple(BACKGROUNDS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
}
"""What captions can name, and the values in the order of their indices."""


def rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on ``key`` alone; text and numbers both count."""
    words = [int.from_bytes(str(part).encode(), "little") for part in key]
    return np.random.default_rng(np.random.SeedSequence(words))


@dataclass(frozen=True, slots=True)
class Scene:
    """One object on one background. Lengths are pixels of the 64-pixel picture, ``light`` is in [-1, 1]."""

    shape: str
    colour: str
    fill: str
    background: str
    position: str
    size: str
    cx: float
    cy: float
    diameter: float
    light: float = 0.0

    @property
    def factors(self) -> dict[str, str]:
        """The six nameable factors."""
        return {name: getattr(self, name) for name in FACTORS}

    @property
    def indices(self) -> tuple[int, ...]:
        """The factors as indices into ``FACTORS``, in its order."""
        return tuple(values.index(getattr(self, name)) for name, values in FACTORS.items())

    @staticmethod
    def draw(seed: int, index: int) -> Scene:
        """Scene ``index`` of the training set ``seed``: every factor uniform and independent."""
        return Scene.having({}, rng("scene", seed, index))

    @staticmethod
    def having(factors: dict[str, str], generator: np.random.Generator) -> Scene:
        """A scene with the given factors; what they leave open is drawn."""
        drawn = {name: values[int(generator.integers(len(values)))] for name, values in FACTORS.items()}
        drawn.update(factors)
        middle, diameter, light = generator.uniform(-1.2, 1.2, 2), generator.uniform(-1, 1), generator.uniform(-1, 1)
        right, down = POSITIONS[drawn["position"]]
        standard, way = SIZES[drawn["size"]]
        centre = draw.SIDE / 2
        return Scene(
            **drawn,
            cx=centre + right * way + float(middle[0]),
            cy=centre + down * way + float(middle[1]),
            diameter=standard + float(diameter),
            light=float(light),
        )

    def on(self, background: str) -> Scene:
        """The same object before another background."""
        return replace(self, background=background)


def background(name: str, light: float) -> draw.Array:
    """A smooth vertical gradient, float (64, 64, 3) in [0, 1]; ``light`` shifts it by up to 4 %."""
    top, bottom = (np.array(colour) / 255 for colour in BACKGROUNDS[name])
    way = np.linspace(0, 1, draw.SIDE)[:, None, None]
    return np.broadcast_to((top * (1 - way) + bottom * way + 0.04 * light).clip(0, 1), (draw.SIDE, draw.SIDE, 3))


def plain_paint(colour: str, fill: str) -> draw.Paint:
    """The paint that the words ``fill`` and ``colour`` mean."""
    first, second = (np.array(tone) / 255 for tone in COLOURS[colour])
    return lambda u, v: np.where(draw.FILLS[fill](u, v)[..., None], second, first)


def compose(scene: Scene, shape: draw.Shape, paint: draw.Paint) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw any object at the scene's place: picture uint8 (64, 64, 3) and mask uint8 (64, 64), 255 = object."""
    canvas = background(scene.background, scene.light)
    picture, mask = draw.lay(canvas, shape, paint, scene.cx, scene.cy, scene.diameter)
    return draw.to_bytes(picture), draw.to_bytes(mask)


def render_arrays(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Picture uint8 (64, 64, 3) and mask uint8 (64, 64) of a scene."""
    return compose(scene, draw.SHAPES[scene.shape], plain_paint(scene.colour, scene.fill))


def render(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """Picture (RGB) and mask (L, 255 = object) of a scene, 64 x 64."""
    picture, mask = render_arrays(scene)
    return Image.fromarray(picture), Image.fromarray(mask)
