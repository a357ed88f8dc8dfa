"""BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from data_tools.captioning.captioner import Caption, Decoding
from data_tools.captioning.generating import as_captions, generate
from data_tools.captioning.loading import Source


class Blip:
    """Describes a picture, or goes on with words that a caption begins with.

    Args:
        instruction: those words, such as "a photo of"; they are part of the caption.
    """

    samples = True

    def __init__(self, source: Source, decoding: Decoding, instruction: str | None) -> None:
        self._source, self._decoding, self._opening = source, decoding, instruction
        self._processor = source.processor()
        self._model = source.model(BlipForConditionalGeneration)

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """As ``Captioner.captions``."""
        text = None if self._opening is None else [self._opening] * len(images)
        inputs = self._source.put(self._processor(images=list(images), text=text, return_tensors="pt"))
        given = 0 if text is None else inputs["input_ids"].shape[1] - 2  # of the opening, without its start and end
        tokens = generate(self._model, inputs, self._decoding, generators)[:, 1:]  # all but the start
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return as_captions(texts, tokens[:, given:], self._decoding, [self._model.config.text_config.sep_token_id])
