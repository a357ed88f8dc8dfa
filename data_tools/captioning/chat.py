"""Chat models that see: whatever transformers has as "image-text-to-text", of which Qwen-VL is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from data_tools.captioning.captioner import Caption, Decoding
from data_tools.captioning.generating import as_captions, end_tokens, generate
from data_tools.captioning.loading import Source
from finetune.errors import UserError

INSTRUCTION = "Describe this picture in one sentence, as a caption. Answer with the caption alone."


class Chat:
    """Follows an instruction about a picture.

    Args:
        instruction: in words; ``INSTRUCTION`` where it is not given.

    Raises:
        UserError: the model's files have no template for a conversation.
    """

    samples = True

    def __init__(self, source: Source, decoding: Decoding, instruction: str | None) -> None:
        self._source, self._decoding = source, decoding
        self._instruction = INSTRUCTION if instruction is None else instruction
        self._processor = source.processor()
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"{source.option} {source.name}: has no chat template, so no instruction can be put to it")
        self._processor.tokenizer.padding_side = "left"  # prompts end where answers begin, whatever their lengths
        self._model = source.model(AutoModelForImageTextToText)

    def captions(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None] = ()
    ) -> list[Caption]:
        """As ``Captioner.captions``."""
        questions = [[{"role": "user", "content": [{"type": "image", "image": image}, self._text]}] for image in images]
        inputs = self._processor.apply_chat_template(
            questions,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs = self._source.put(inputs)
        tokens = generate(self._model, inputs, self._decoding, generators)
        written = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return as_captions(texts, written, self._decoding, end_tokens(self._model.generation_config))

    @property
    def _text(self) -> dict[str, str]:
        return {"type": "text", "text": self._instruction}
