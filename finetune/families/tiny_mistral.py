"""Mistral language models of random weights for twins, and a tokenizer that speaks the embedded world's words."""

from __future__ import annotations

from typing import Any

from finetune.families.tiny_qwen import byte_pairs, sizes

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "[{{ mark }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"
)


def tokenizer() -> Any:
    """A tokenizer as Mistral's newer ones are: of bytes, it begins every text with a token and pads before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(**byte_pairs(SPECIAL), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(SPECIAL[4:]),
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=2048,
    )


def mistral3(width: int, layers: int) -> Any:
    """A Mistral 3 whose eyes are as small as they can be."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**sizes(width, layers, len(tokenizer())), head_dim=8, sliding_window=None)
    sight = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    config = Mistral3Config(text_config=text, vision_config=sight, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config).eval()
