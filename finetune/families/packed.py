"""Latents as transformers read them that were trained on patches: four cells are one token, as in Flux."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h / 2 · w / 2, 4 C], row by row; of a token's numbers the four of a channel stand together."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back to [B, C, ``height``, ``width``]."""
    batch, _, numbers = tokens.shape
    cells = tokens.view(batch, height // 2, width // 2, numbers // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, numbers // 4, height, width)
