"""FLUX.2 klein: the FLUX.2 whose text encoder is a Qwen3 (Black Forest Labs 2026,
https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence; no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from finetune.families import flux2
from finetune.families.language_model import TEXT_ENCODER
from finetune.families.parts import Part, read_json
from finetune.family import Published


class Flux2Klein(flux2.Flux2Folder):
    """A folder in the layout of ``Flux2KleinPipeline``: the base models and those that are distilled from them.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "flux2-klein"
    published = Published("flux-2-klein")
    models: ClassVar[str] = "FLUX.2 klein"
    pipelines: ClassVar[Sequence[str]] = ("Flux2KleinPipeline",)
    parts: ClassVar[Mapping[str, Part]] = flux2.parts("Qwen3ForCausalLM")
    depths: ClassVar[Sequence[int]] = (9, 18, 27)

    def wrap(self, text: str) -> str:
        """``text`` as a user's question to a Qwen3 that does not think before it answers."""
        wrapped: str = self.tokenizers[TEXT_ENCODER].apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return wrapped

    def pipeline_settings(self) -> dict[str, Any]:
        """Whether guidance is distilled into the model, which then takes no other."""
        return {"is_distilled": read_json(self.folder / "model_index.json").get("is_distilled", False)}


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``Flux2KleinPipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import Flux2KleinPipeline

    from finetune.families.tiny import drawn
    from finetune.families.tiny_qwen import qwen3, tokenizer

    width = 8
    with drawn(seed):
        Flux2KleinPipeline(
            text_encoder=qwen3(width, layers=Flux2Klein.depths[-1] + 1, kind="Qwen3ForCausalLM"),
            tokenizer=tokenizer(),
            **flux2.tiny_parts(width, guidance_embeds=False),
        ).save_pretrained(path)
    return path


FAMILY = Flux2Klein
