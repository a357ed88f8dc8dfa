"""What the embedded world's small CLIP has beside the base's text encoder: an image tower and two projections."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.tinyworld.judge import Pictures, as_tensor
from finetune.tinyworld.vision import Eye

FOLDER = Path(__file__).parent / "clip"


class Towers(nn.Module):
    """``Towers.load()`` gives the trained ones, whose text tower is the shipped base's text encoder.

    Args:
        width: of the text encoder.
        joint: dimensions of the space that text and pictures share.
    """

    def __init__(self, width: int, joint: int) -> None:
        super().__init__()
        self.eye = Eye()
        self.text_projection = nn.Linear(width, joint, bias=False)
        self.image_projection = nn.Linear(self.eye.features, joint, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Towers:
        """The trained towers, in evaluation mode, float32 on the CPU."""
        towers = cls(**json.loads((folder / "towers.json").read_text(encoding="utf-8")))
        towers.load_state_dict({key: value.float() for key, value in load_file(folder / "towers.safetensors").items()})
        return towers.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images: Pictures) -> Tensor:
        """Pictures to vectors of the shared space, float32 (B, ``joint``), their lengths left as they are."""
        seen: Tensor = self.image_projection(self.eye(as_tensor(images)))
        return seen
