"""Captions to what CLIP text encoders read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.family import Vocabulary


def tokenized(vocabulary: Vocabulary, captions: Sequence[str], device: torch.device) -> Any:
    """``input_ids`` and ``attention_mask``, int64 [B, T], cut or padded to all that the encoder reads."""
    return vocabulary.tokenizer(
        [vocabulary.expand(caption) for caption in captions],
        padding="max_length",
        max_length=vocabulary.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(device)


def penultimate(encoder: Any, vocabulary: Vocabulary, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hidden states before the last layer [B, T, D], without the final norm, and the encoder's pooled answer [B, P].

    What SDXL, SD 3 and FLUX.1 read. A ``CLIPTextModelWithProjection`` answers with the projected state at the end of
    the text, a ``CLIPTextModel`` with that state itself.
    """
    answer = encoder(tokenized(vocabulary, captions, encoder.device).input_ids, output_hidden_states=True)
    pooled = answer.text_embeds if "text_embeds" in answer else answer.pooler_output
    return answer.hidden_states[-2], pooled


def last_layer(settings: Mapping[str, Any]) -> Sequence[str]:
    """Patterns of what the hidden states before a CLIP text encoder's last layer do not depend on."""
    return (rf"(^|\.)encoder\.layers\.{settings['num_hidden_layers'] - 1}\.", r"(^|\.)final_layer_norm\b")


def overflow(tokenizer: Any, caption: str, words: Mapping[str, int] | None = None) -> int:
    """How many tokens of ``caption`` are cut off, where ``words`` are as many tokens as they say."""
    between = re.split("|".join(map(re.escape, words)), caption) if words else [caption]
    count = sum(len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in between)
    count += sum(vectors * caption.count(word) for word, vectors in (words or {}).items())
    special = tokenizer.num_special_tokens_to_add()
    return max(0, count + special - tokenizer.model_max_length)
