"""Denoisers of published sizes without weights: settings of their model cards, most of them diffusers' defaults."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3: Mapping[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
DENOISERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "SD 1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "SD 3 medium": ("SD3Transformer2DModel", SD3),
    "SDXL": ("UNet2DConditionModel", SDXL),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "FLUX.2 dev": ("Flux2Transformer2DModel", {}),
}
"""Name -> diffusers' class and settings; small ones first."""


def denoiser(name: str) -> nn.Module:
    """One of ``DENOISERS`` on the meta device."""
    kind, settings = DENOISERS[name]
    with torch.device("meta"):
        found: nn.Module = getattr(importlib.import_module("diffusers"), kind).from_config(dict(settings))
    return found
