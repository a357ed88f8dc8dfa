"""Florence-2 (Xiao et al. 2023, https://arxiv.org/abs/2311.06242), in the layout that transformers knows itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import Florence2ForConditionalGeneration

from data_tools.captioning.captioner import Caption, Decoding
from data_tools.captioning.generating import as_captions, end_tokens, generate
from data_tools.captioning.loading import Source
from finetune.errors import UserError, nearest

TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


class Florence2:
    """Describes a picture as one of its tasks asks.

    Args:
        instruction: a task; "<CAPTION>" where it is not given.

    Raises:
        UserError: the instruction is not one of ``TASKS``, the only ones that give a caption.
    """

    samples = True

    def __init__(self, source: Source, decoding: Decoding, instruction: str | None) -> None:
        self._source, self._decoding, self._task = source, decoding, instruction or TASKS[0]
        if self._task not in TASKS:
            raise UserError(
                f"--instruction: Florence-2 takes a task and no sentence, found {self._task!r}; "
                f"expected one of {', '.join(TASKS)}{nearest(self._task.upper(), TASKS) if '<' in self._task else ''}"
            )
        self._processor = source.processor()
        self._model = source.model(Florence2ForConditionalGeneration)

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """As ``Captioner.captions``."""
        text = [self._task] * len(images)
        inputs = self._source.put(self._processor(images=list(images), text=text, return_tensors="pt"))
        written = generate(self._model, inputs, self._decoding, generators)[:, 1:]  # all but the decoder's start
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return as_captions(texts, written, self._decoding, end_tokens(self._model.generation_config))
