"""What families have in common whose denoiser is a transformer of two streams, one for the prompt and one for the
picture, that attend to each other (Esser et al. 2024, https://arxiv.org/abs/2403.03206): SD 3, Flux.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.families.unet import CLIP_ATTENTION, CLIP_LAYERS, CLIP_WIDE, NORMS
from finetune.family import Unsupported

Patterns = Mapping[str, Mapping[str, Sequence[str]]]

READERS = Unsupported("its denoiser has no cross-attention layers; prompt and picture share their attention")

_ATTENTION = r".*\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FEED_FORWARD = r".*\.ff(_context)?\.net\.(0\.proj|2)"


def linears(clips: Sequence[str], *further: str) -> Patterns:
    """``Sites.linears`` of such a transformer beside ``clips``, the CLIP text encoders that train with it.

    Args:
        further: patterns of layers that do the work of ``ff`` in blocks of another kind; in the preset "wide".
    """
    transformer = {
        "attention": [_ATTENTION],
        "context": [r".*\.attn\.(add_[qkv]_proj|to_add_out)"],
        "wide": [_ATTENTION, _FEED_FORWARD, *further],
        "blocks": [r"(single_)?transformer_blocks\..*"],
    }
    text = {preset: CLIP_WIDE if preset in ("wide", "blocks") else CLIP_ATTENTION for preset in transformer}
    return _beside(transformer, text, clips)


def selections(clips: Sequence[str]) -> Patterns:
    """``Sites.selections`` of such a transformer beside ``clips``."""
    transformer = {
        "all": [""],
        "attention": [r"\.attn2?\."],
        "context": [r"\.attn\.(add_|to_add_out|norm_added_)", r"\.(norm1|ff)_context\."],
        "norm-bias": NORMS,
        "blocks": [r"^(single_)?transformer_blocks\."],
    }
    text = {preset: {"all": [""], "norm-bias": NORMS}.get(preset, CLIP_LAYERS) for preset in transformer}
    return _beside(transformer, text, clips)


def _beside(
    transformer: Mapping[str, Sequence[str]], text: Mapping[str, Sequence[str]], clips: Sequence[str]
) -> Patterns:
    return {preset: {"denoiser": found, **dict.fromkeys(clips, text[preset])} for preset, found in transformer.items()}
