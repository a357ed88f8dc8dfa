"""FLUX.2 dev: the FLUX.2 whose text encoder is a Mistral Small 3, and whose denoiser is told a scale of guidance (Black
Forest Labs 2025, https://bfl.ai/blog/flux-2; no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from finetune.families import flux2
from finetune.families.language_model import TEXT_ENCODER
from finetune.families.parts import Part
from finetune.family import Published

PICTURE = "[IMG]"
"""Stands for a picture in a conversation; the pipeline strikes it from prompts."""


class Flux2Dev(flux2.Flux2Folder):
    """A folder in the layout of ``Flux2Pipeline``.

    What the pipeline calls its tokenizer is published as a processor, which reads pictures too. Only the tokenizer in
    it is loaded: of text both make the same tokens.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "flux2-dev"
    published = Published("flux-2-dev")
    models: ClassVar[str] = "FLUX.2 dev"
    pipelines: ClassVar[Sequence[str]] = ("Flux2Pipeline",)
    parts: ClassVar[Mapping[str, Part]] = flux2.parts("Mistral3ForConditionalGeneration")
    depths: ClassVar[Sequence[int]] = (10, 20, 30)
    guidance: float | None = 1.0

    def wrap(self, text: str) -> str:
        """``text`` as a user's, in a conversation about describing pictures; special tokens written out."""
        said = {"system": SYSTEM_MESSAGE, "user": text.replace(PICTURE, "")}
        wrapped: str = self.tokenizers[TEXT_ENCODER].apply_chat_template(
            [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in said.items()],
            tokenize=False,
            add_generation_prompt=False,
        )
        return wrapped


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``Flux2Pipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import Flux2Pipeline

    from finetune.families.tiny import drawn
    from finetune.families.tiny_mistral import mistral3, tokenizer

    width = 8
    with drawn(seed):
        Flux2Pipeline(
            text_encoder=mistral3(width, layers=Flux2Dev.depths[-1] + 1),
            tokenizer=tokenizer(),
            **flux2.tiny_parts(width, guidance_embeds=True),
        ).save_pretrained(path)
    return path


FAMILY = Flux2Dev
