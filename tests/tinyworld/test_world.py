import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.tinyworld import draw, world
from finetune.tinyworld.world import FACTORS, Scene


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert Scene.draw(3, 14) == Scene.draw(3, 14)
    assert len({Scene.draw(3, index) for index in range(50)} | {Scene.draw(4, index) for index in range(50)}) == 100
    first, second = (world.render(Scene.draw(3, 14))[0].tobytes() for _ in range(2))
    assert first == second


def test_every_value_of_every_factor_is_drawn_about_equally_often() -> None:
    rows = np.array([Scene.draw(0, index).indices for index in range(2000)])
    for at, values in enumerate(FACTORS.values()):
        counts = np.bincount(rows[:, at], minlength=len(values))
        assert counts.min() > 0.7 * 2000 / len(values)


@pytest.mark.parametrize("shape", FACTORS["shape"])
def test_mask_is_exactly_where_the_object_changes_the_picture(shape: str) -> None:
    scene = Scene.having({"shape": shape}, world.rng("mask", shape))
    picture, mask = world.render_arrays(scene)
    empty = draw.to_bytes(np.array(world.background(scene.background, scene.light)))
    assert (picture[mask == 0] == empty[mask == 0]).all()
    inner = mask == 255
    assert inner.sum() > 100
    assert (np.abs(picture[inner].astype(int) - empty[inner]).max(-1) > 8).all()


def test_mask_of_a_circle_has_the_area_of_a_circle() -> None:
    scene = Scene.having({"shape": "circle", "size": "large", "position": "in the centre"}, world.rng("area"))
    mask = world.render_arrays(scene)[1] / 255
    assert mask.sum() == pytest.approx(np.pi * (scene.diameter / 2) ** 2, rel=0.01)


def test_objects_stay_within_the_picture() -> None:
    for index in range(300):
        mask = world.render_arrays(Scene.draw(9, index))[1] / 255
        scene = Scene.draw(9, index)
        column, row = (mask.sum(0) @ np.arange(64), mask.sum(1) @ np.arange(64)) / mask.sum()
        assert abs(column + 0.5 - scene.cx) < 2
        assert abs(row + 0.5 - scene.cy) < 6  # a triangle's centre of mass is low


def test_object_colours_and_backgrounds_are_far_apart() -> None:
    tones = [np.array(first) for first, _ in world.COLOURS.values()]
    grounds = [np.array(end) for ends in world.BACKGROUNDS.values() for end in ends]
    between = [np.linalg.norm(a - b) for at, a in enumerate(tones) for b in tones[:at]]
    against = [np.linalg.norm(a - b) for a in tones for b in grounds]
    assert min(between) > 70
    assert min(against) > 50


def test_backgrounds_are_smooth() -> None:
    for name in FACTORS["background"]:
        steps = np.abs(np.diff(np.array(world.background(name, 1.0)), axis=0))
        assert steps.max() < 4 / 255


def test_picture_and_mask_are_pil() -> None:
    picture, mask = world.render(Scene.draw(0, 0))
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size, mask.mode, mask.size) == ("RGB", (64, 64), "L", (64, 64))


def test_the_package_loads_no_torch() -> None:
    code = "import sys, finetune.tinyworld, finetune.tinyworld.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
