"""Subjects: one individual of a class, with an appearance that the caption language cannot express.

A subject has the shape of its class, two colours that meet along a line at some angle, an outline and a central dot,
all in colours of its own. ``subject(seed)`` is a pure function; seeds are non-negative, and the individuals that the
judge and the autoencoder were trained with come from a space of their own (``training_subject``).
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.errors import UserError
from finetune.tinyworld import captions, draw, world
from finetune.tinyworld.world import FACTORS, Scene

INSTANCES, HELDOUT, SCENES = 5, 8, 10
RIM, DOT = 0.1, 0.17  # width of the outline and radius of the dot, as parts of the diameter


@dataclass(frozen=True, slots=True)
class Subject:
    """One individual. ``angle`` (radians) is the direction in which its first colour gives way to the second."""

    seed: int
    shape: str
    token: str
    first: world.Colour
    second: world.Colour
    outline: world.Colour
    dot: world.Colour
    angle: float

    @property
    def instance_prompt(self) -> str:
        """Such as "a zib star"."""
        return captions.compose({"shape": self.shape}, token=self.token)

    @property
    def class_prompt(self) -> str:
        """Such as "a star"."""
        return captions.compose({"shape": self.shape})

    def inside(self, u: draw.Array, v: draw.Array) -> draw.Inside:
        """The class's shape and the dot, which closes the hole of a ring."""
        return draw.SHAPES[self.shape](u, v) | (np.hypot(u, v) <= DOT)

    def paint(self, u: draw.Array, v: draw.Array) -> draw.Array:
        """Two tones, the outline around them and the dot on top."""
        first, second, outline, dot = (np.array(c) / 255 for c in (self.first, self.second, self.outline, self.dot))
        body = np.where((u * np.cos(self.angle) + v * np.sin(self.angle) > 0)[..., None], first, second)
        core = draw.SHAPES[self.shape](u / (1 - 2 * RIM), v / (1 - 2 * RIM))
        if self.shape == "ring":
            core = draw.SHAPES["ring"](u, v) & (np.hypot(u, v) <= 0.5 - RIM)
        if self.shape == "cross":
            core = draw.SHAPES["cross"](u, v) & ~_rim_of_cross(u, v)
        painted = np.where(core[..., None], body, outline)
        return np.where((np.hypot(u, v) <= DOT)[..., None], dot, painted)

    def render_arrays(self, scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Picture uint8 (64, 64, 3) and mask uint8 (64, 64); the scene's shape, colour and fill don't count."""
        return world.compose(scene, self.inside, self.paint)

    def render(self, scene: Scene) -> tuple[Image.Image, Image.Image]:
        """Picture (RGB) and mask (L, 255 = object), 64 x 64."""
        picture, mask = self.render_arrays(scene)
        return Image.fromarray(picture), Image.fromarray(mask)


def _rim_of_cross(u: draw.Array, v: draw.Array) -> draw.Inside:
    arm, length = 0.165 - 0.055, 0.5 - RIM
    return (np.minimum(np.abs(u), np.abs(v)) > arm) | (np.maximum(np.abs(u), np.abs(v)) > length)


def subject(seed: int) -> Subject:
    """The subject of a seed.

    Raises:
        UserError: for a negative seed.
    """
    if seed < 0:
        raise UserError(f"subject seed {seed} is negative; expected 0 or more")
    return _individual(seed, world.rng("subject", seed))


def training_subject(seed: int, index: int) -> Subject:
    """An individual for training judges and autoencoders; never one that ``subject`` returns."""
    return _individual(index, world.rng("training subject", seed, index))


def _individual(seed: int, generator: np.random.Generator) -> Subject:
    shape = FACTORS["shape"][int(generator.integers(len(FACTORS["shape"])))]
    turn, steps = generator.random(), generator.permutation(4)
    colours = [_vivid(turn + int(step) / 4 + generator.uniform(-0.06, 0.06), generator) for step in steps]
    first, second, outline, dot = colours
    return Subject(
        seed, shape, captions.RARE[seed % len(captions.RARE)], first, second, outline, dot, generator.uniform(0, 6.28)
    )


def _vivid(hue: float, generator: np.random.Generator) -> world.Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, generator.uniform(0.65, 1), generator.uniform(0.45, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def instance_scenes(one: Subject) -> list[Scene]:
    """The scenes of the five instance pictures: five positions, five backgrounds, mostly large."""
    generator = world.rng("instance scenes", one.seed)
    backgrounds = generator.permutation(FACTORS["background"])[:INSTANCES]
    positions = generator.permutation(FACTORS["position"])
    sizes = generator.permutation(["large", "large", "large", "small", "small"])
    return [
        _scene(one, str(background), str(position), str(size), generator)
        for background, position, size in zip(backgrounds, positions, sizes, strict=True)
    ]


def new_scenes(one: Subject, count: int) -> list[Scene]:
    """Scenes whose pairs of background and position are none of the instance pictures'; spread over both."""
    generator = world.rng("new scenes", one.seed)
    seen = {(scene.background, scene.position) for scene in instance_scenes(one)}
    pairs = [(b, p) for b in FACTORS["background"] for p in FACTORS["position"] if (b, p) not in seen]
    chosen: list[tuple[str, str]] = []
    for _ in range(min(count, len(pairs))):
        used = [value for pair in chosen for value in pair]
        rank = [used.count(b) + used.count(p) + generator.random() for b, p in pairs]
        chosen.append(pairs.pop(int(np.argmin(rank))))
    return [_scene(one, b, p, str(generator.choice(FACTORS["size"])), generator) for b, p in chosen]


def _scene(one: Subject, background: str, position: str, size: str, generator: np.random.Generator) -> Scene:
    named = {"shape": one.shape, "background": background, "position": position, "size": size}
    return Scene.having(named, generator)


def prompt_of(one: Subject, scene: Scene, token: str | None = None) -> tuple[str, dict[str, str]]:
    """The prompt that names the subject and its place, and the factors that a judge can check in the picture."""
    named = {"shape": one.shape, "background": scene.background, "position": scene.position}
    return captions.compose(named, token=one.token if token is None else token), named


def scene_prompts(one: Subject, token: str | None = None, count: int = SCENES) -> list[tuple[str, dict[str, str]]]:
    """Prompts for the subject in new places, such as "a zib star on grass at the left", and the factors they name.

    No pair of background and position is one of the instance pictures'. ``token`` stands before the class word (the
    subject's own rare token by default, "" for none).
    """
    return [prompt_of(one, scene, token) for scene in new_scenes(one, count)]


def instance_pictures(one: Subject) -> list[Image.Image]:
    """The five instance pictures."""
    return [one.render(scene)[0] for scene in instance_scenes(one)]


def heldout_pictures(one: Subject, count: int = HELDOUT) -> list[Image.Image]:
    """Other pictures of the subject, in places that the instance pictures don't show."""
    return [one.render(scene)[0] for scene in new_scenes(one, count)]
