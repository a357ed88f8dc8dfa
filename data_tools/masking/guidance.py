"""Target-guided attention (Zhang et al. 2023, arXiv 2305.03048) in the mask decoders of transformers.

Their ``attention_similarity`` is added to the scores before the softmax. Personalize-SAM adds it behind one, and takes
a second: softmax(softmax(QKᵀ/√d) + S). That is another function: the inner softmax leaves most of 4096 places near 0,
so that S decides. So the decoder gets an attention of this file's own, which without S is the ordinary one. One thing
stays different: the authors' code adds the target's features to the decoder's last attention too, transformers doesn't.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "target_guided"


def attend_guided(model: Any) -> None:
    """Let the mask decoder of a ``SamModel`` or ``Sam2Model`` attend as above."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, guided_attention)
    model.config.mask_decoder_config._attn_implementation = NAME


def guided_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention with a bias S on its weights.

    Args:
        query, key, value: [batch, heads, tokens, channels].
        attention_mask: S, broadcast to [batch, heads, queries, keys].

    Returns:
        what is attended to, [batch, queries, heads, channels], and the weights.
    """
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
    if attention_mask is not None:
        weights = torch.softmax(weights + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights
