"""Masks from words: CLIPSeg says where what they name is, and SAM, where there is one, draws its outline.

Lüddecke and Ecker 2022, arXiv 2112.10003.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from data_tools.masking.prompts import Prompt
from data_tools.masking.view import Segmenter
from data_tools.masking.way import Photo, Values, box_of


class ClipSeg:
    """A CLIPSeg.

    Args:
        model: ``CLIPSegForImageSegmentation``.
        processor: its ``CLIPSegProcessor``.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @torch.inference_mode()
    def find(self, image: Image.Image, text: str) -> Values:
        """Where an RGB picture shows what a text names, float32 [h, w] in [0, 1]."""
        given = self.processor(text=[text], images=[image], padding=True, return_tensors="pt").to(self.model.device)
        logits = self.model(**given).logits.float()
        logits = logits.reshape(1, 1, *logits.shape[-2:])
        whole = F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)
        return whole[0, 0].sigmoid().cpu().numpy()


class Named:
    """The way that finds what a text names.

    Args:
        outline: draws what was found anew, from the box around it and the place that is most certain.
        cut: value from which a pixel counts as found.
    """

    def __init__(self, clipseg: ClipSeg, text: str, outline: Segmenter | None = None, cut: float = 0.5) -> None:
        self.clipseg, self.text, self.outline, self.cut = clipseg, text, outline, cut

    def __call__(self, photo: Photo) -> Values:
        """As ``Way``."""
        found = self.clipseg.find(photo.rgb, self.text)
        box = box_of(found >= self.cut)
        if self.outline is None or box is None:
            return found
        row, column = divmod(int(found.argmax()), found.shape[1])
        left, top, right, bottom = box
        view = self.outline.look(photo.rgb)
        prompt = Prompt(((column, row),), (1,), (left, top, right, bottom))
        return self.outline.whole(view, self.outline.predict(view, prompt))
