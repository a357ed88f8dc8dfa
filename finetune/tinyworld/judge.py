"""The judge: reads the named factors off a picture, and says how alike two individuals look.

A small convolutional network that never saw the base's text encoder. Its embedding is trained to be the same for two
pictures of one individual, whatever the background, place and size, and different for any other individual, one of
the same class too: the part that DINO features play in the DreamBooth protocol (Ruiz et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.tinyworld.vision import Eye
from finetune.tinyworld.world import FACTORS

FOLDER = Path(__file__).parent / "judge"
EMBEDDING = 64
Pictures = Tensor | Sequence[Image.Image]
"""Float (B, 3, 64, 64) in [0, 1], or PIL pictures of any size."""


class Judge(nn.Module):
    """Attribute heads and an embedding on one small eye; ``Judge.load()`` gives the trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = Eye()
        self.heads = nn.ModuleDict({n: nn.Linear(self.eye.features, len(v)) for n, v in FACTORS.items()})
        self.embedding = nn.Sequential(nn.Linear(self.eye.features, 128), nn.SiLU(), nn.Linear(128, EMBEDDING))

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Judge:
        """The trained judge, in evaluation mode, float32 on the CPU."""
        judge = cls()
        judge.load_state_dict({key: value.float() for key, value in load_file(folder / "judge.safetensors").items()})
        return judge.eval().requires_grad_(False)

    def logits(self, pictures: Tensor) -> dict[str, Tensor]:
        """Factor name to logits (B, number of values)."""
        return self.look(pictures)[0]

    def features(self, pictures: Tensor) -> Tensor:
        """Unit vectors (B, 64)."""
        return self.look(pictures)[1]

    def look(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Both at once, for float pictures (B, 3, 64, 64) in [0, 1]."""
        seen = self.eye(pictures)
        logits = {name: head(seen) for name, head in self.heads.items()}
        return logits, nn.functional.normalize(self.embedding(seen), dim=-1)

    @torch.no_grad()
    def attributes(self, images: Pictures) -> dict[str, Tensor]:
        """Factor name to the index in ``FACTORS[name]`` of what the judge sees, int64 (B,)."""
        return {name: scores.argmax(-1) for name, scores in self.logits(as_tensor(images)).items()}

    def attribute_names(self, images: Pictures) -> list[dict[str, str]]:
        """For each picture, factor name to the word for what the judge sees."""
        read = self.attributes(images)
        count = len(next(iter(read.values())))
        return [{name: FACTORS[name][int(read[name][row])] for name in FACTORS} for row in range(count)]

    @torch.no_grad()
    def embed(self, images: Pictures) -> Tensor:
        """Instance embeddings, float (B, 64) of unit length: the dot product of two says how alike they are."""
        return self.features(as_tensor(images))

    def prompt_accuracy(self, images: Pictures, factors: Sequence[Mapping[str, str]]) -> Tensor:
        """Share of the named factors that the judge reads off each picture, float (B,).

        Args:
            images: B pictures.
            factors: what each picture's prompt names, such as ``{"shape": "star", "background": "on grass"}``.

        Raises:
            UserError: when the numbers differ, or a factor or value is none of the world's.
        """
        read = self.attributes(images)
        count = len(next(iter(read.values())))
        if count != len(factors):
            raise UserError(f"{count} pictures to judge by {len(factors)} sets of factors; expected as many")
        return torch.tensor([_share(named, read, row) for row, named in enumerate(factors)])


def _share(named: Mapping[str, str], read: Mapping[str, Tensor], row: int) -> float:
    if unknown := [f"{name}: {value}" for name, value in named.items() if value not in FACTORS.get(name, ())]:
        raise UserError(f"the world has no {unknown[0]}; its factors are {', '.join(FACTORS)}")
    right = [int(read[name][row]) == FACTORS[name].index(value) for name, value in named.items()]
    return sum(right) / len(right) if right else 1.0


def as_tensor(images: Pictures) -> Tensor:
    """Pictures as float (B, 3, 64, 64) in [0, 1]; PIL pictures are converted to RGB and resized where needed."""
    if isinstance(images, Tensor):
        return images.float()
    small = [image.convert("RGB") for image in images]
    small = [image if image.size == (64, 64) else image.resize((64, 64), Image.Resampling.BOX) for image in small]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 255
