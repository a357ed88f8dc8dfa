"""WD taggers: networks in ONNX that give a picture tags of a list (https://huggingface.co/SmilingWolf)."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_tools.captioning.captioner import Caption
from data_tools.captioning.loading import NETWORK, TAGS, Source
from finetune.errors import UserError

GENERAL, CHARACTER = 0, 4  # the categories of tags that describe; 9 is the rating, which does not
_A_WORD = re.compile(r"[^\W_]{2}")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How likely a tag must be to be written: names of characters are wrong more often than other tags."""

    general: float = 0.35
    character: float = 0.85


class Tagger:
    """Tags, the likeliest first, with commas between them.

    Args:
        session: an ``onnxruntime.InferenceSession``; opened from the source's files where it is not given.

    Raises:
        UserError: onnxruntime is not installed, or the list of tags does not fit the network.
    """

    samples = False

    def __init__(self, source: Source, thresholds: Thresholds, session: Any = None) -> None:
        self._tags = read_tags(source.folder / TAGS)
        self._thresholds = thresholds
        self._session = _open(source) if session is None else session
        entrance = self._session.get_inputs()[0]
        self._entrance, (self._most, self._side, *_) = entrance.name, entrance.shape
        found = self._session.get_outputs()[0].shape[-1]
        if found != len(self._tags):
            raise UserError(
                f"{source.folder / TAGS}: has {len(self._tags)} tags, but the network gives {found} numbers"
            )

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """As ``Captioner.captions``."""
        size = self._most if isinstance(self._most, int) else len(images)  # some networks take one picture at a time
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return [self._caption(row) for part in parts for row in self._likely(part)]

    def _likely(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        pixels = np.stack([squared(image, self._side) for image in images])
        found: NDArray[np.float32] = self._session.run(None, {self._entrance: pixels})[0]
        return found

    def _caption(self, likely: NDArray[np.float32]) -> Caption:
        least = {GENERAL: self._thresholds.general, CHARACTER: self._thresholds.character}
        order = np.argsort(-likely, kind="stable")
        kept = [self._tags[i] for i in order if likely[i] >= least.get(self._tags[i].category, np.inf)]
        return Caption(", ".join(tag.name for tag in kept))


@dataclass(frozen=True, slots=True)
class Tag:
    """A line of the list of tags, its name as it is written in a caption."""

    name: str
    category: int


def read_tags(path: Path) -> list[Tag]:
    """The tags of ``selected_tags.csv``, in the order of the network's numbers.

    Raises:
        UserError: the file cannot be read, or a column or number in it.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return [Tag(spoken(row["name"]), int(row["category"])) for row in rows]
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no list of tags with the columns name and category: {error!r}") from None


def spoken(tag: str) -> str:
    """A tag with spaces for underscores, unless it is a face: "long_hair" is "long hair", "^_^" stays."""
    return tag.replace("_", " ") if _A_WORD.search(tag) else tag


def squared(image: Image.Image, side: int) -> NDArray[np.float32]:
    """A picture as the networks were shown it: on a white square, float32 (side, side, 3), blue first, 0 to 255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[..., ::-1])


def _open(source: Source) -> Any:
    path = source.folder / NETWORK
    if not path.is_file():
        raise UserError(f"{source.option} {source.name}: has {TAGS}, but no {NETWORK}")
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"{source.option} {source.name}: is a tagger in ONNX, which needs onnxruntime: "
            "pip install 'finetune[caption]'; for a GPU, pip install onnxruntime-gpu"
        ) from None
    providers = ["CUDAExecutionProvider"] if source.device.type == "cuda" else []
    have = onnxruntime.get_available_providers()
    return onnxruntime.InferenceSession(
        path, providers=[name for name in [*providers, "CPUExecutionProvider"] if name in have]
    )
