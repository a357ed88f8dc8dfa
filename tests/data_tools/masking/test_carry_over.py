"""Personalize-SAM with features that a person can follow: colours. The steps, the maths, and the true masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from data_tools.masking.carry import CarriedOver, likeness, location, target_of
from data_tools.masking.models import load
from data_tools.masking.plain import otsu
from data_tools.masking.prompts import Prompt
from data_tools.masking.view import Guide, View
from data_tools.masking.way import Photo, Values
from finetune.errors import UserError
from finetune.tinyworld.subject import instance_scenes, subject

CELL = 4


class Colours:
    """A segmenter whose features are colours, and which draws what has the colour of the point on the subject."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def look(self, image: Image.Image) -> View:
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 127.5 - 1
        return View(image.size, F.avg_pool2d(pixels[None], CELL)[0], (CELL, CELL))

    def predict(
        self,
        view: View,
        prompt: Prompt,
        previous: Tensor | None = None,
        guide: Guide | None = None,
        several: bool | None = None,
    ) -> Tensor:
        self.asked.append({"prompt": prompt, "previous": previous, "guide": guide, "several": several})
        x, y = (int(value // CELL) for value in prompt.points[0])
        return 20 * (likeness(view.features, view.features[:, y, x]) - 0.9)

    def whole(self, view: View, logits: Tensor) -> Values:
        wide = logits.sigmoid().repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        return wide.numpy()


def scene(*things: tuple[str, tuple[int, int, int, int]], ground: str = "green") -> Image.Image:
    image = Image.new("RGB", (64, 48), ground)
    for colour, box in things:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), colour)
    return image


def mask_of(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (64, 48))
    mask.paste(255, box)
    return mask


REFERENCE = Photo(Path("reference.png"), scene(("red", (4, 8, 20, 24)), ("blue", (40, 20, 60, 40))))
OTHER = Photo(Path("other.png"), scene(("blue", (4, 4, 24, 24)), ("red", (32, 20, 56, 44)), ground="white"))


def test_the_mask_lands_on_the_thing_of_the_same_colour() -> None:
    red = CarriedOver(Colours(), REFERENCE, mask_of((4, 8, 20, 24)))(OTHER)
    blue = CarriedOver(Colours(), REFERENCE, mask_of((40, 20, 60, 40)))(OTHER)
    assert np.array_equal(red > 0.5, np.asarray(mask_of((32, 20, 56, 44))) > 0)
    assert np.array_equal(blue > 0.5, np.asarray(mask_of((4, 4, 24, 24))) > 0)


def test_each_step_begins_with_the_mask_of_the_one_before() -> None:
    sam = Colours()
    way = CarriedOver(sam, REFERENCE, mask_of((4, 8, 20, 24)))
    way(OTHER)
    first, second, third = sam.asked
    points = first["prompt"].points
    assert first["prompt"].labels == (1, 0) and first["prompt"].box is None
    assert 32 <= points[0][0] < 56 and 20 <= points[0][1] < 44  # on the red thing
    assert not (32 <= points[1][0] < 56 and 20 <= points[1][1] < 44)
    assert first["guide"].target is way.target and first["guide"].likeness.shape == (12, 16)
    assert first["previous"] is None and first["several"] is False
    assert second["prompt"] == first["prompt"] and second["guide"] is None and second["several"]
    assert third["prompt"] == Prompt(points, (1, 0), (32, 20, 55, 43)) and third["guide"] is None and third["several"]
    view = sam.look(OTHER.rgb)
    for step in (second, third):
        assert torch.equal(step["previous"], 20 * (likeness(view.features, torch.tensor([1.0, -1, -1])) - 0.9))


def test_target_and_likeness_are_the_paper_s() -> None:
    features = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    view = View((64, 48), features, (CELL, CELL))
    whole = target_of(view, mask_of((8, 4, 16, 12)))
    torch.testing.assert_close(whole, features[:, 1:3, 2:4].mean((1, 2)))
    part = target_of(view, mask_of((8, 4, 14, 8)))  # one cell, and half of the next
    torch.testing.assert_close(part, (features[:, 1, 2] + 0.5 * features[:, 1, 3]) / 1.5)
    found = likeness(features, whole)
    one = features[:, 7, 9]
    assert float(found[7, 9]) == pytest.approx(float(one @ whole / one.norm() / whole.norm()), abs=1e-5)
    torch.testing.assert_close(found, likeness(3 * features, 0.1 * whole))  # lengths do not count
    most, least = location(view, found).points
    for place, index in ((most, int(found.argmax())), (least, int(found.argmin()))):
        assert place == (CELL * (index % 16 + 0.5), CELL * (index // 16 + 0.5))


class Histograms(Colours):
    """Colours around each pixel, counted in 64 kinds; draws what is more like the subject than Otsu's threshold."""

    def look(self, image: Image.Image) -> View:
        kinds = (np.array(image) // 64).astype(np.int64) @ np.array([16, 4, 1])
        counted = F.one_hot(torch.from_numpy(kinds), 64).permute(2, 0, 1).float()
        return View(image.size, F.avg_pool2d(counted[None], 5, 1, 2)[0], (1.0, 1.0))

    def predict(
        self,
        view: View,
        prompt: Prompt,
        previous: Tensor | None = None,
        guide: Guide | None = None,
        several: bool | None = None,
    ) -> Tensor:
        if guide is None:
            assert previous is not None
            return previous
        return guide.likeness - otsu(guide.likeness.numpy())

    def whole(self, view: View, logits: Tensor) -> Values:
        return logits.sigmoid().numpy()


def test_subjects_of_the_embedded_world_are_found_again() -> None:
    """One mask of each subject is carried over to its four other pictures, on other backgrounds and elsewhere."""
    sam, shares = Histograms(), []
    for seed in range(3):
        first, *others = map(subject(seed).render, instance_scenes(subject(seed)))
        way = CarriedOver(sam, Photo(Path("0.png"), first[0]), first[1])
        for number, (picture, mask) in enumerate(others, 1):
            true = np.asarray(mask) > 127
            view = sam.look(picture)
            (x, y), (left, top) = location(view, likeness(view.features, way.target)).points
            assert true[int(y), int(x)] and not true[int(top), int(left)]
            found = way(Photo(Path(f"{number}.png"), picture)) > 0.5
            shares.append((found & true).sum() / (found | true).sum())
    assert np.mean(shares) > 0.8


@pytest.mark.parametrize("kind", ["tiny_sam", "tiny_sam2"])
def test_with_a_real_decoder(kind: str, request: pytest.FixtureRequest) -> None:
    sam = load([str(request.getfixturevalue(kind))], torch.device("cpu")).sam
    assert sam is not None
    way = CarriedOver(sam, REFERENCE, mask_of((4, 8, 20, 24)))
    assert way.target.shape == (32,)
    values = way(OTHER)
    assert values.shape == (48, 64) and values.dtype == np.float32 and 0 <= values.min() <= values.max() <= 1
    assert np.array_equal(values, way(OTHER))


def test_the_annotated_picture_keeps_its_mask_and_a_mask_must_fit() -> None:
    mask = mask_of((4, 8, 20, 24))
    assert np.array_equal(CarriedOver(Colours(), REFERENCE, mask)(REFERENCE) * 255, np.asarray(mask))
    with pytest.raises(UserError, match=r"is 8 x 8 pixels, but reference.png is 64 x 48"):
        CarriedOver(Colours(), REFERENCE, Image.new("L", (8, 8), 255))
    with pytest.raises(UserError, match=r"--reference-mask: is empty"):
        CarriedOver(Colours(), REFERENCE, Image.new("L", (64, 48)))
