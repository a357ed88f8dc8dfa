"""Denoisers and text encoders of the published sizes, without weights: the settings on their model cards' pages."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.plan.published import SD3, SDXL

SD1 = {"cross_attention_dim": 768}
FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM = {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}

DENOISERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd1": (UNet2DConditionModel, SD1),
    "sdxl": (UNet2DConditionModel, SDXL),
    "flux": (FluxTransformer2DModel, FLUX),
    "sd3": (SD3Transformer2DModel, SD3),
    "sd3.5-large": (SD3Transformer2DModel, SD35_LARGE),
    "sd3.5-medium": (SD3Transformer2DModel, SD35_MEDIUM),
}


@functools.cache
def denoiser(name: str) -> Any:
    kind, settings = DENOISERS[name]
    with torch.device("meta"):
        return kind.from_config(settings)


@functools.cache
def clip(width: int, layers: int, projected: bool = False) -> nn.Module:
    """CLIP-L is 768 wide with 12 layers, CLIP-G 1280 with 32."""
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
        )
        return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def layers_of(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
