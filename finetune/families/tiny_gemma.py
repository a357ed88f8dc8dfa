"""Gemma 2 language models of random weights for twins, and a tokenizer that speaks the embedded world's words."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from finetune.tinyworld.captions import words
from finetune.tinyworld.tokenizer import merges_for

SPACE = "▁"  # how vocabularies of pieces write it
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def tokenizer(further: Sequence[str] = ()) -> Any:
    """A Gemma tokenizer: one token for each word of the world, alone and behind a space; characters, else bytes.

    Args:
        further: words that are one token each behind a space.
    """
    from transformers import GemmaTokenizer

    merges = merges_for([*words(), *(SPACE + word for word in (*words(), *further))], end="")
    bytewise = (f"<0x{byte:02X}>" for byte in range(256))
    letters = (*string.digits, *string.ascii_letters, *string.punctuation, "\n", SPACE)
    tokens = dict.fromkeys([*SPECIAL, *bytewise, *letters, *(left + right for left, right in merges)])
    return GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        add_bos_token=True,
        model_max_length=2048,
    )


def gemma2(width: int, tokens: int) -> Any:
    """A Gemma 2 for so many ``tokens``; as in published ones its table has rows that no token has."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=tokens + 8,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=2048,
    )
    return Gemma2Model(config).eval()
