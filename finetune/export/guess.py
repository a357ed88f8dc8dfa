"""Which model an adapter file is for, from the names and shapes of its layers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from finetune.export.keys import Key

FAMILIES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sd": "Stable Diffusion 1 or 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3 or 3.5",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "lumina2": "Lumina-Image 2.0",
    "sana": "Sana",
}
"""What can be told apart."""

Shapes = Mapping[str, Sequence[int]]

_PROMPT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of a prompt's token vectors
_FLUX = re.compile(r"(double|single)_blocks_|single_transformer_blocks_")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_")


def called(name: str) -> str | None:
    """The key of ``FAMILIES`` for what this toolkit calls a family; None for one that is not among them."""
    return next((key for key in sorted(FAMILIES, key=len, reverse=True) if name.startswith(key)), None)


def family(keys: Sequence[Key], shapes: Shapes) -> str | None:
    """A key of ``FAMILIES``; None where nothing tells.

    Args:
        shapes: of the tensors, by key.
    """
    words = {key.word for key in keys}
    if any(_UNET.match(word) for word in words):
        return _unet(keys, shapes)
    if any(_FLUX.match(word) for word in words):
        return _flux(keys, shapes)
    if any(re.match(r"transformer_blocks_\d+_(attn1_|ff_conv_)", word) for word in words):
        return _cross(keys, shapes)
    if any(re.match(r"joint_blocks_|transformer_blocks_\d+_(ff_context_|attn2_)", word) for word in words):
        return "sd3"
    if any(re.match(r"transformer_blocks_\d+_(img_m|txt_m)", word) for word in words):
        return "qwen-image"
    if any(re.match(r"(layers|\w+_refiner)_\d+_(attn_to_|feed_forward_linear_|norm1_linear)", word) for word in words):
        return "lumina2"
    if any(re.match(r"(layers_\d+_attention_|noise_refiner_|context_refiner_)", word) for word in words):
        return "z-image"
    if any(word.startswith("transformer_blocks_") for word in words):
        return _joint(keys, shapes)
    return _text(keys, shapes)


def _unet(keys: Sequence[Key], shapes: Shapes) -> str | None:
    for key in keys:
        if key.part in ("down", "diff") and re.search(r"attn2_to_[kv]$", key.word):
            return _PROMPT.get(shapes[key.text][1])
    if any(re.search(r"transformer_blocks_[1-9]", key.word) for key in keys):
        return "sdxl"
    return _text(keys, shapes) or "sd"


def _flux(keys: Sequence[Key], shapes: Shapes) -> str:
    """FLUX.2 has fewer blocks, whose feed-forward layers are wider and whose modulation is one for all blocks."""
    for key in keys:
        if re.search(r"stream_modulation|to_qkv_mlp_proj$|ff_context_linear_in$", key.word):
            return "flux2"
        wide = re.search(r"(mlp_0|linear1)$", key.word)
        if wide and key.part == "up":
            inputs = next((shapes[one.text][1] for one in keys if one.layer == key.layer and one.part == "down"), 0)
            return "flux" if inputs and shapes[key.text][0] in (4 * inputs, 7 * inputs) else "flux2"
    widths = [
        shapes[key.text][1] for key in keys if key.part == "down" and re.search(r"(qkv|to_q|add_q_proj)$", key.word)
    ]
    return "flux" if not widths or widths[0] == 3072 else "flux2"


def _cross(keys: Sequence[Key], shapes: Shapes) -> str | None:
    """Cross-attention in no U-Net: Sana's, by its convolutions or its width, which others of the kind have not."""
    widths = {shapes[key.text][1] for key in keys if key.part == "down" and re.search(r"attn[12]_to_[qkv]", key.word)}
    return "sana" if 2240 in widths or any("_ff_conv_" in key.word for key in keys) else None


def _joint(keys: Sequence[Key], shapes: Shapes) -> str | None:
    """Attention alone, under names that three families share."""
    widths = {shapes[key.text][1] for key in keys if key.part == "down" and re.search(r"attn_(to|add)_[qkv]", key.word)}
    last = max(int(found[1]) for key in keys if (found := re.match(r"transformer_blocks_(\d+)", key.word)))
    if widths & {1536, 2432}:
        return "sd3"
    if widths == {3072}:
        return "qwen-image" if last > 18 else "flux"
    return None


def _text(keys: Sequence[Key], shapes: Shapes) -> str | None:
    """By the text encoders, where several are there or there is nothing else."""
    networks = {key.network for key in keys}
    if networks & {"lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer"}:
        return "sdxl" if not networks & {"lora_te3", "text_encoder_3"} else "sd3"
    widths = {shapes[key.text][1] for key in keys if key.part == "down" and key.word.endswith("q_proj")}
    if networks & {"lora_te", "text_encoder"} and widths & {768, 1024}:
        return "sd1" if 768 in widths else "sd2"
    return None
