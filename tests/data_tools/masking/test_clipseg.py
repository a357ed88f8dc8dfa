"""Masks from words, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_tools.masking.models import load
from data_tools.masking.prompts import Prompt
from data_tools.masking.text import ClipSeg, Named
from data_tools.masking.view import Guide, View
from data_tools.masking.way import Photo, Values


@pytest.fixture
def clipseg(tiny_clipseg: Path) -> ClipSeg:
    found = load([str(tiny_clipseg)], torch.device("cpu")).clipseg
    assert found is not None
    return found


def test_words_decide_what_is_found(clipseg: ClipSeg, noise: Image.Image) -> None:
    star, night = (clipseg.find(noise, text) for text in ("a star", "at night on snow"))
    assert star.shape == (30, 50) and star.dtype == np.float32
    assert 0 <= star.min() < star.max() <= 1
    assert not np.allclose(star, night)
    given = clipseg.processor(text=["a star"], images=[noise], return_tensors="pt")
    with torch.inference_mode():
        logits = clipseg.model(**given).logits
    assert logits.shape[-2:] == (48, 48)
    scaled = torch.nn.functional.interpolate(logits.reshape(1, 1, 48, 48), (30, 50), mode="bilinear")
    np.testing.assert_allclose(star, scaled[0, 0].sigmoid(), rtol=1e-5)


class Outline:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def look(self, image: Image.Image) -> View:
        return View(image.size, torch.zeros(1, 1, 1), (1.0, 1.0))

    def predict(
        self,
        view: View,
        prompt: Prompt,
        previous: Tensor | None = None,
        guide: Guide | None = None,
        several: bool | None = None,
    ) -> Tensor:
        self.asked.append(prompt)
        return torch.ones(2, 2)

    def whole(self, view: View, logits: Tensor) -> Values:
        return np.ones((view.size[1], view.size[0]), dtype=np.float32)


def test_sam_is_asked_for_what_words_have_found(clipseg: ClipSeg, noise: Image.Image, monkeypatch) -> None:
    found = np.zeros((30, 50), dtype=np.float32)
    found[5:9, 20:31] = 0.6
    found[7, 22] = 0.9
    monkeypatch.setattr(clipseg, "find", lambda image, text: found)
    outline, photo = Outline(), Photo(Path("a.png"), noise)
    assert Named(clipseg, "a dog", outline)(photo).all()
    assert outline.asked == [Prompt(((22, 7),), (1,), (20, 5, 30, 8))]
    assert np.array_equal(Named(clipseg, "a dog", outline, cut=0.95)(photo), found)  # nothing to draw an outline of
    assert len(outline.asked) == 1
