"""Captions to what CLIP text encoders make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from finetune.batch import Conditioning
from finetune.families import long_prompts


def final(encoder: Any, tokenizer: Any, texts: Sequence[str], chunks: int) -> Conditioning:
    """The encoder's last hidden states, after its final norm: what Stable Diffusion 1.x and 2.x read."""
    masked = getattr(encoder.config, "use_attention_mask", False)

    def encode(ids: Tensor, real: Tensor) -> tuple[Tensor, None]:
        mask = real.to(encoder.device) if masked else None
        return encoder(ids.to(encoder.device), attention_mask=mask)[0], None

    return long_prompts.read(tokenizer, texts, chunks, encode)


def penultimate(encoder: Any, tokenizer: Any, texts: Sequence[str], chunks: int = 1) -> Conditioning:
    """The hidden states before the last layer, without the final norm, and the encoder's pooled answer.

    What SDXL and SD 3 read. A ``CLIPTextModelWithProjection`` answers with the projected state at the end of the text,
    a ``CLIPTextModel`` with that state itself.
    """

    def encode(ids: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        answer = encoder(ids.to(encoder.device), output_hidden_states=True)
        return answer.hidden_states[-2], answer.text_embeds if "text_embeds" in answer else answer.pooler_output

    return long_prompts.read(tokenizer, texts, chunks, encode)


def pooled(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The encoder's state at the end of each text, [N, D]: all of a CLIP that Flux reads."""

    def encode(ids: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        answer = encoder(ids.to(encoder.device))
        return answer.last_hidden_state, answer.pooler_output

    found = long_prompts.read(tokenizer, texts, 1, encode).pooled
    assert found is not None
    return found


def last_layer(settings: Mapping[str, Any]) -> Sequence[str]:
    """Patterns of what the hidden states before a CLIP text encoder's last layer do not depend on."""
    return (rf"(^|\.)encoder\.layers\.{settings['num_hidden_layers'] - 1}\.", r"(^|\.)final_layer_norm\b")
