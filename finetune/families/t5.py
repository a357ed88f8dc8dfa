"""Captions to what T5 text encoders make of them (Raffel et al. 2019, https://arxiv.org/abs/1910.10683)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from finetune.families.parts import Part
from finetune.tinyworld.captions import words as world_words


def part(subfolder: str, tokenizer: str) -> Part:
    """A T5 encoder. Its dropouts were for its own training: prompts are read as pictures are drawn, without them."""
    return Part(subfolder, "transformers.T5EncoderModel", tokenizer, settings={"dropout_rate": 0.0})


def states(encoder: Any, tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """The encoder's last hidden states, [N, ``length``, D].

    Every text is cut or padded to ``length`` tokens, and padding is read like any token: the pipelines mask nothing.
    """
    told = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    read: Tensor = encoder(told.input_ids.to(encoder.device))[0]
    return read


def overflow(tokenizer: Any, text: str, length: int, words: Mapping[str, int] | None = None) -> int:
    """How many tokens of ``text`` have no room in ``length``, its end included.

    Args:
        words: new words that the tokenizer does not know yet -> how many tokens each will be.
    """
    ahead = words or {}
    parts = re.split(f"({'|'.join(map(re.escape, ahead))})", text) if ahead else [text]
    read = sum(len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids) for part in parts[::2])
    return max(0, read + sum(ahead[word] for word in parts[1::2]) + 1 - length)


def tiny_tokenizer() -> Any:
    """One token for each word of the embedded world, single characters for everything else."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    whole = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(letter, -8.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=[*special, *whole, *letters], extra_ids=0, model_max_length=512)


def tiny_encoder(width: int) -> Any:
    """A T5 encoder of two layers with random weights; as in published ones its table has rows that no token has."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tiny_tokenizer()) + 8,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )
    return T5EncoderModel(config).eval()
