"""Segment Anything, its first and its second version, behind one interface.

Kirillov et al. 2023 (arXiv 2304.02643), Ravi et al. 2024 (arXiv 2408.00714). Pictures are encoded once and prompts
scaled here, as the processors of transformers do; that of SAM 2 needs torchvision, which nothing else here does.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_tools.masking.prompts import Prompt
from data_tools.masking.view import Guide, View
from data_tools.masking.way import Photo, Values
from finetune.errors import UserError


class Sam:
    """A SAM or a SAM 2.

    Args:
        model: ``SamModel`` or ``Sam2Model``.
        preprocessing: its ``image_mean`` and ``image_std``.
    """

    def __init__(self, model: Any, preprocessing: Mapping[str, Any]) -> None:
        from data_tools.masking.guidance import attend_guided

        self.model = model.eval().requires_grad_(False)
        attend_guided(model)
        self.side: int = model.config.prompt_encoder_config.image_size
        self.pads = model.config.model_type == "sam"  # the first version keeps the ratio of sides, the second does not
        self.device: torch.device = model.device
        self._mean, self._std = (torch.tensor(preprocessing[key]) for key in ("image_mean", "image_std"))

    @torch.inference_mode()
    def look(self, image: Image.Image) -> View:
        """Encode an RGB picture."""
        wide, high = self._inner(image.size)
        scaled = torch.from_numpy(np.array(image.resize((wide, high), Image.Resampling.BILINEAR))) / 255
        pixels = ((scaled - self._mean) / self._std).permute(2, 0, 1)[None]
        pixels = F.pad(pixels, (0, self.side - wide, 0, self.side - high)).to(self.device, self.model.dtype)
        encoded = self.model.get_image_embeddings(pixels)
        grid = encoded[0] if self.pads else encoded[-1][0]
        rows, columns = grid.shape[-2:]
        inside = grid[:, : ceil(high * rows / self.side), : ceil(wide * columns / self.side)]
        cell = image.width * self.side / (wide * columns), image.height * self.side / (high * rows)
        return View(image.size, inside.float(), cell, encoded)

    @torch.inference_mode()
    def predict(
        self,
        view: View,
        prompt: Prompt,
        previous: Tensor | None = None,
        guide: Guide | None = None,
        several: bool | None = None,
    ) -> Tensor:
        """As ``Segmenter.predict``."""
        if several is None:
            several = len(prompt.points) == 1 and prompt.box is None
        given: dict[str, Any] = {"image_embeddings": view.encoded, "multimask_output": several}
        if prompt.points:
            given["input_points"] = self._scaled(view, [list(point) for point in prompt.points])[None]
            given["input_labels"] = torch.tensor([[prompt.labels]], device=self.device)
        if prompt.box:
            corners = [list(prompt.box[:2]), list(prompt.box[2:])]
            given["input_boxes"] = self._scaled(view, corners).reshape(1, 1, 4)
        if previous is not None:
            given["input_masks"] = previous[None, None].to(self.device, self.model.dtype)
        if guide is not None:
            given["attention_similarity"] = self._attention(view, guide.likeness)
            given["target_embedding"] = guide.target.to(self.model.dtype)
        found = self.model(**given)
        best = found.iou_scores[0, 0].argmax()
        return found.pred_masks[0, 0, best].float()

    @torch.inference_mode()
    def whole(self, view: View, logits: Tensor) -> Values:
        """As ``Segmenter.whole``: the padding is cut off and the rest scaled to the picture, float32 [h, w]."""
        wide, high = self._inner(view.size)
        square = F.interpolate(logits[None, None], (self.side, self.side), mode="bilinear", align_corners=False)
        inner = square[..., :high, :wide]
        scaled = F.interpolate(inner, (view.size[1], view.size[0]), mode="bilinear", align_corners=False)
        return scaled[0, 0].sigmoid().cpu().numpy()

    def _inner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that a picture has within the square that is encoded."""
        if not self.pads:
            return self.side, self.side
        wide, high = (int(side * self.side / max(size) + 0.5) for side in size)
        return max(1, wide), max(1, high)

    def _scaled(self, view: View, places: list[list[float]]) -> Tensor:
        """Places [N, 2] in pixels of the picture as places in the square, float [1, N, 2]."""
        wide, high = self._inner(view.size)
        factors = torch.tensor([wide / view.size[0], high / view.size[1]])
        return (torch.tensor(places) * factors)[None].to(self.device, self.model.dtype)

    def _attention(self, view: View, likeness: Tensor) -> Tensor:
        """Personalize-SAM's bias: the likeness, standardised, through a sigmoid, [1, 1, 1, cells]; 0 in the padding."""
        grid = view.encoded if self.pads else view.encoded[-1]
        spread = likeness.std().clamp(min=1e-6)
        bias = torch.zeros(grid.shape[-2:], device=self.device)
        rows, columns = likeness.shape
        bias[:rows, :columns] = ((likeness - likeness.mean()) / spread).sigmoid()
        return bias.flatten()[None, None, None].to(self.model.dtype)


class Prompted:
    """The way that asks SAM for what points and boxes show.

    Args:
        prompts: by the name of the picture's file.
        otherwise: for pictures that have none of their own.
    """

    def __init__(self, sam: Sam, prompts: Mapping[str, Prompt], otherwise: Prompt | None) -> None:
        self.sam, self.prompts, self.otherwise = sam, prompts, otherwise

    def __call__(self, photo: Photo) -> Values:
        """As ``Way``."""
        prompt = self.prompts.get(photo.path.name, self.otherwise)
        if prompt is None:
            raise UserError(f"{photo.path}: has no line in --prompts, and no --points or --box is given for all")
        inside = prompt.in_pixels(*photo.rgb.size, where=str(photo.path))
        view = self.sam.look(photo.rgb)
        return self.sam.whole(view, self.sam.predict(view, inside))
