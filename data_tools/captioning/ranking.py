"""Which of several captions fits a picture best, and which phrases of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from data_tools.captioning.captioner import Caption
from data_tools.captioning.scorer import Scorer, in_parts
from finetune.errors import UserError


class Phrases:
    """Phrases of a list, found in pictures: CLIP interrogation.

    Args:
        phrases: one or more.
        top: how many of them a picture gets, at most.
    """

    samples = False

    def __init__(self, scorer: Scorer, phrases: Sequence[str], top: int) -> None:
        self._scorer, self._phrases, self._top = scorer, phrases, min(top, len(phrases))
        self._features = in_parts(scorer, phrases)

    def best(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """The nearest phrases of each picture, nearest first."""
        near = self._scorer.images(images) @ self._features.T
        order = near.sort(dim=1, descending=True, stable=True).indices[:, : self._top]
        return [[self._phrases[index] for index in row] for row in order.tolist()]

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """The phrases as a caption, with commas: a ``Captioner`` that draws nothing."""
        return [Caption(", ".join(phrases)) for phrases in self.best(images)]


def read_phrases(path: Path) -> list[str]:
    """The phrases of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--phrases: {path} cannot be read: {error}") from None
    phrases = [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not phrases:
        raise UserError(f"--phrases: {path} holds no phrases; expected one a line")
    return list(dict.fromkeys(phrases))


def choose(scorer: Scorer, images: Sequence[Image.Image], choices: Sequence[Sequence[Caption]]) -> list[Caption]:
    """The caption of each picture that is nearest to it; the first of equally near ones. Empty ones are never taken.

    Args:
        choices: of each picture, as many for each; one at least.
    """
    seen = scorer.images(images)
    best = []
    for picture, captions in zip(seen, choices, strict=True):
        said = [caption for caption in dict.fromkeys(captions) if caption.text]
        near = scorer.texts([caption.text for caption in said]) @ picture if len(said) > 1 else None
        best.append(captions[0] if not said else said[0] if near is None else said[int(near.argmax())])
    return best
