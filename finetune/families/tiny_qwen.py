"""Qwen language models of random weights for twins, and a tokenizer that speaks the embedded world's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.tinyworld.captions import words
from finetune.tinyworld.tokenizer import byte_letters, merges_for

SPACE = "Ġ"  # how byte-level vocabularies write it
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_pairs(special: Sequence[str]) -> dict[str, Any]:
    """``vocab`` and ``merges``: one token for each word of the world, alone and behind a space, bytes for the rest."""
    merges = merges_for([*words(), *(SPACE + word for word in words())], end="")
    tokens = dict.fromkeys([*byte_letters(), *(left + right for left, right in merges), *special])
    return {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}


def tokenizer() -> Any:
    """A Qwen tokenizer."""
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        **byte_pairs(special),
        extra_special_tokens=special[1:],
        chat_template=TEMPLATE,
        model_max_length=2048,
    )


def sizes(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A small language model's; as in published ones its table has rows that no token has."""
    return {
        "vocab_size": vocabulary + 8,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    }


def qwen3(width: int, layers: int = 2, kind: str = "Qwen3Model") -> Any:
    """A Qwen3."""
    import transformers

    config = transformers.Qwen3Config(**sizes(width, layers, len(tokenizer())), head_dim=8, tie_word_embeddings=True)
    return getattr(transformers, kind)(config).eval()


def qwen25vl(width: int) -> Any:
    """A Qwen2.5-VL whose eyes are as small as they can be."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **sizes(width, 2, len(tokenizer())),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }
    sight = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config).eval()
