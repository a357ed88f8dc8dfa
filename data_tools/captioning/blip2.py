"""BLIP-2 (Li et al. 2023, https://arxiv.org/abs/2301.12597)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from data_tools.captioning.captioner import Caption, Decoding
from data_tools.captioning.generating import as_captions, end_tokens, generate
from data_tools.captioning.loading import Source


class Blip2:
    """Describes a picture, or answers about it.

    Args:
        instruction: such as "Question: what is the dog doing? Answer:"; not part of the caption.
    """

    samples = True

    def __init__(self, source: Source, decoding: Decoding, instruction: str | None) -> None:
        self._source, self._decoding, self._question = source, decoding, instruction
        self._processor = source.processor()
        self._model = source.model(Blip2ForConditionalGeneration)
        self._processor.num_query_tokens = self._model.config.num_query_tokens  # old files do not say it
        self._speaker = self._model.language_model

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """As ``Captioner.captions``."""
        text = None if self._question is None else [self._question] * len(images)
        inputs = self._source.put(self._processor(images=list(images), text=text, return_tensors="pt"))
        tokens = generate(self._model, inputs, self._decoding, generators)
        if self._speaker.config.is_encoder_decoder:
            given = 1  # the token that a decoder starts with
        else:
            given = self._processor.num_query_tokens + 1 if text is None else inputs["input_ids"].shape[1]
        written = tokens[:, given:]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return as_captions(texts, written, self._decoding, end_tokens(self._speaker.generation_config))
