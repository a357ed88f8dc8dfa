"""What families have in common whose denoiser is a transformer of two streams, one for the prompt and one for the
picture, that attend to each other (Esser et al. 2024, https://arxiv.org/abs/2403.03206): SD 3, Flux.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.families import patterns
from finetune.family import Unsupported

READERS = Unsupported("its denoiser has no cross-attention layers; prompt and picture share their attention")

_ATTENTION = r".*\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FEED_FORWARD = r".*\.ff(_context)?\.net\.(0\.proj|2)"


def linears(clips: Sequence[str], *further: str) -> patterns.Patterns:
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
    return patterns.linears(transformer, clips, wide=("wide", "blocks"))


def selections(clips: Sequence[str]) -> patterns.Patterns:
    """``Sites.selections`` of such a transformer beside ``clips``."""
    transformer = {
        "all": [""],
        "attention": [r"\.attn2?\."],
        "context": [r"\.attn\.(add_|to_add_out|norm_added_)", r"\.(norm1|ff)_context\."],
        "norm-bias": patterns.NORMS,
        "blocks": [r"^(single_)?transformer_blocks\."],
    }
    return patterns.selections(transformer, clips)
