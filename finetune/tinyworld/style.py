"""Styles: one way of drawing everything. The colours are turned and flattened, and scan lines run over the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.errors import UserError
from finetune.tinyworld import captions, world
from finetune.tinyworld.world import Scene

INSTANCES, HELDOUT = 12, 8
FLATNESS, OPACITY = 0.85, 0.45  # what is left of the contrast of colours, and how much a line covers


@dataclass(frozen=True, slots=True)
class Style:
    """``turn`` mixes the colour channels (3 x 3), ``tint`` is the colour of the lines, which are ``period`` apart."""

    seed: int
    token: str
    turn: NDArray[np.float64]
    tint: world.Colour
    period: int
    upright: bool

    def apply_array(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture uint8 (h, w, 3) in this style."""
        turned = (picture / 255 - 0.5) @ self.turn.T * FLATNESS + 0.5
        across = np.arange(picture.shape[1 if self.upright else 0]) % self.period < self.period // 2
        lines = (across[None, :] if self.upright else across[:, None])[..., None] * OPACITY
        return np.rint((turned * (1 - lines) + np.array(self.tint) / 255 * lines).clip(0, 1) * 255).astype(np.uint8)

    def apply(self, picture: Image.Image) -> Image.Image:
        """A picture in this style."""
        return Image.fromarray(self.apply_array(np.asarray(picture.convert("RGB"))))

    def prompt(self, scene: Scene) -> str:
        """What the scene shows, "in the style of" this style's token."""
        named = {name: scene.factors[name] for name in ("shape", "colour", "background")}
        return f"{captions.compose(named)} in the style of {self.token}"


def style(seed: int) -> Style:
    """The style of a seed.

    Raises:
        UserError: for a negative seed.
    """
    if seed < 0:
        raise UserError(f"style seed {seed} is negative; expected 0 or more")
    generator = world.rng("style", seed)
    axis = generator.normal(size=3)
    turn = _rotation(axis / np.linalg.norm(axis), generator.uniform(0.6, 1.2))
    tint = tuple(int(value) for value in generator.integers(0, 256, 3))
    token = captions.RARE[seed % len(captions.RARE)]
    return Style(seed, token, turn, (tint[0], tint[1], tint[2]), 8, bool(generator.integers(2)))


def training_scenes(seed: int) -> list[Scene]:
    """The scenes of a style's training pictures."""
    return [Scene.having({}, world.rng("style scene", seed, at)) for at in range(INSTANCES)]


def heldout_scenes(seed: int) -> list[Scene]:
    """Other scenes, that no training sees."""
    return [Scene.having({}, world.rng("style scene", seed, INSTANCES + at)) for at in range(HELDOUT)]


def _rotation(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Rodrigues: the matrix that turns colours, seen as points around grey, about a unit axis."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
