"""The border of what writes captions: one class a kind of model, chosen by ``models.load_captioner``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from PIL import Image

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Caption:
    """What a model says of a picture.

    Attributes:
        text: as the model wrote it, on one line.
        full: whether it took as many tokens as it was allowed to, so that its end may be missing.
    """

    text: str
    full: bool = False


@dataclass(frozen=True, slots=True)
class Decoding:
    """How words are chosen.

    Attributes:
        max_new_tokens: that a caption may have.
        beams: of a beam search; 1 takes the likeliest token at every place.
        temperature, top_p: of captions that are sampled.
    """

    max_new_tokens: int = 100
    beams: int = 1
    temperature: float = 0.7
    top_p: float = 0.9


class Captioner(Protocol):
    """Writes a caption for each picture, which does not depend on the others of its batch.

    Attributes:
        samples: whether it can be asked for other captions of the same picture.
    """

    samples: bool

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """A caption of each picture.

        Args:
            images: RGB, of any sizes.
            generators: one for each picture; None, or none at all, takes the likeliest words.

        Raises:
            ValueError: a picture is of a shape that the model cannot take.
        """
        ...
